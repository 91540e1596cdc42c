"""Takes the pictures of the README from a finished study, with Chromium, into docs/images.

python docs/take_screenshots.py STUDY [--set KEY=VALUE ...]
"""

from __future__ import annotations

import threading
from pathlib import Path

import click
from playwright.sync_api import Page, sync_playwright

from lat_optuna import dashboard, figures, pipeline
from lat_optuna.spec import load_spec

IMAGES = Path(__file__).parent / "images"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def shoot(page: Page, name: str) -> None:
    """Take one picture of what is in view."""
    page.wait_for_timeout(2000)  # figures fade in
    page.screenshot(path=IMAGES / f"{name}.png")


@click.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
@click.option("--browser", default="/usr/bin/chromium", show_default=True)
def main(study: Path, overrides: tuple[str, ...], browser: str) -> None:
    """Take report.png, dashboard.png and front.png."""
    spec = load_spec(study, overrides)
    report = pipeline.report(spec, study_file=str(study))
    _, front, baselines = pipeline.load_front(spec)
    figures.export_figure(figures.front_figure(front, baselines), IMAGES / "front.png")
    (server,) = dashboard.make_servers([spec.storage], port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=FLAGS)
        page = chromium.new_page(viewport={"width": 1000, "height": 1250})
        page.set_default_timeout(120_000)
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("#figure-front .main-svg")
        shoot(page, "report")
        page = chromium.new_page(viewport={"width": 1300, "height": 1100})
        page.set_default_timeout(120_000)
        page.goto(f"{dashboard.address(server)}/studies/1")
        page.wait_for_selector("[id='user-defined-plot:front'] .xtitle")
        page.wait_for_selector("[id='user-defined-plot:lengths'] .xtitle")
        page.locator("[id='user-defined-plot:front']").evaluate("place => place.scrollIntoView({ block: 'center' })")
        shoot(page, "dashboard")
        chromium.close()
    server.shutdown()


if __name__ == "__main__":
    main()

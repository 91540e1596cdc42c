"""Put the OptunaHub package together: what is written here, and four modules of lat_optuna, which need only optuna.

python hub/build.py FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("length_config.py", "search/plan.py", "search/surrogate.py", "search/sampler.py")


def build(folder: Path) -> Path:
    """Write ``length_config_search`` into a folder, as it lies in ``package/samplers`` of OptunaHub's registry."""
    package = folder / "length_config_search"
    shutil.copytree(ROOT / "hub" / "length_config_search", package, dirs_exist_ok=True)
    shutil.copy(ROOT / "LICENSE", package / "LICENSE")
    for module in MODULES:
        text = (ROOT / "lat_optuna" / module).read_text(encoding="utf-8")
        for name in ("length_config", "search.plan", "search.surrogate", "search.sampler"):
            text = text.replace(f"from lat_optuna.{name} import", f"from .{name.rpartition('.')[2]} import")
        (package / Path(module).name).write_text(text, encoding="utf-8")
    return package


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python hub/build.py FOLDER")
    print(build(Path(sys.argv[1])))  # noqa: T201

"""Anytime prediction: the longer the queue, the smaller the budget. `python examples/serve.py FOLDER < texts`."""

import sys
import threading
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from transformers import AutoTokenizer

import lat_optuna
from lat_optuna import LengthConfig
from lat_optuna.model.checkpoint import read_side_file


class AnytimeServer:
    """One model, one thread. A request waits in a queue; what it may cost depends on how many wait behind it."""

    def __init__(self, folder, ladder):
        self.model, self.tokenizer = lat_optuna.load(folder).eval(), AutoTokenizer.from_pretrained(folder)
        self.ladder, self.queue = ladder, SimpleQueue()  # configurations, from the largest to the smallest
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, text: str) -> Future:
        """The outputs of the model for a text, when they are there."""
        self.queue.put((text, answer := Future()))
        return answer

    def _serve(self):
        while True:
            text, answer = self.queue.get()
            self.model.length_config = self.ladder[min(self.queue.qsize(), len(self.ladder) - 1)]
            with torch.inference_mode():
                answer.set_result(self.model(**self.tokenizer(text, truncation=True, return_tensors="pt")))


def ladder_of(folder, ratios=None):
    """Dense, then the points of the folder's front in falling cost; or constant ratios, where there is no front yet."""
    side = read_side_file(folder)
    if ratios:
        return [None, *(LengthConfig.constant_ratio(each, side.num_layers, side.max_length) for each in ratios)]
    return [None, *(side.config_of(point) for point in reversed(side.front))]


if __name__ == "__main__":
    server = AnytimeServer(sys.argv[1], ladder_of(sys.argv[1]))
    for line in sys.stdin:
        print(server.submit(line.strip()).result().logits.tolist())

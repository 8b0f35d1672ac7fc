"""unsleep's side: `Trainer` with its default settings."""

from __future__ import annotations

from dataclasses import replace

from measure import Rebuilt, Task, run
from torch import Tensor

from unsleep import Site
from unsleep.core import Activations, ActivationStream
from unsleep.dictionaries.architectures.batchtopk import BatchTopK
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.trainer import Trainer


class Unsleep:
    def __init__(self, task: Task, train: Tensor) -> None:
        stream = ActivationStream((len(train),), lambda _: train, Site(0), "benchmark", "benchmark")
        config = TrainConfig(
            architecture=task.architecture,  # type: ignore[arg-type]
            features=task.features,
            k=task.k,
            tokens=task.steps * task.batch,
            batch=task.batch,
            seed=task.seed,
        )
        self.trainer = Trainer(stream.sample(), config)
        self.k = task.k
        self.trained: Coder | None = None

    def step(self, x: Tensor, number: int) -> object:
        return self.trainer.step(x, number)

    def rebuild(self, x: Tensor) -> Rebuilt:
        if self.trained is None:
            self.trained = self.trainer.dictionary(Activations(x, x[:, 0].long(), Site(0), "benchmark", "benchmark"))
        coder = self.trained
        if isinstance(coder, BatchTopK):  # as in training, not by the running threshold
            fired = coder.pre_activations(x).relu().flatten().topk(self.k * len(x), sorted=False)
            coder = replace(coder, threshold=float(fired.values.min()))
        code = coder.encode_sparse(x)
        return Rebuilt(coder.decode_sparse(code), int((code.values > 0).sum()))


if __name__ == "__main__":
    run(Unsleep, ("unsleep",))

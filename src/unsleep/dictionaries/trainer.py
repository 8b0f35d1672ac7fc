"""Training state of one dictionary: float32 master weights, Adam, dead features, checkpoints, and export to a Coder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import store
from unsleep.base.machine import compute_dtype
from unsleep.core import Activations, ActivationStream, BadInput, Site
from unsleep.dictionaries import losses, parallel
from unsleep.dictionaries.architectures import KINDS
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.losses import Batch, Pass, Weights


class Step(NamedTuple):
    """Metrics of one training step."""

    fvu: float
    """Fraction of the batch's variance unexplained."""
    l0: float
    """Mean number of active features per token."""
    dead: int
    """Number of dead features."""


class Scales(NamedTuple):
    """Scale statistics of a sample of activations."""

    scale: float
    """Normalisation factor."""
    mean: Float[Tensor, " d"]
    """Mean of the normalised activations."""
    median_norm: float
    """Median norm of the unnormalised activations."""


def measure(sample: Float[Tensor, "token d"], config: TrainConfig, what: str) -> Scales:
    """Scale statistics of a sample; raises `BadInput` for constant vectors."""
    sample = sample.float()
    norms = sample.norm(dim=1)
    mean = sample.mean(0)
    if not float((sample - mean).norm(dim=1).mean()) > 1e-6 * float(norms.mean()):
        raise BadInput(f"{what} are constant: every token has the same vector; there is nothing to learn")
    size = {
        "mean_norm": float(norms.mean()) / math.sqrt(sample.shape[1]),
        "rms": float(sample.square().mean().sqrt()),
        "none": 1.0,
    }
    scale = 1 / size[config.normalize]
    return Scales(scale, mean * scale, float(norms.median()))


class Trainer:
    """Trains one dictionary batch by batch.

    Args:
        sample: activations for the scales and the initial decoder bias.
        target: reconstruction targets of a transcoder, aligned by token; `None` for an autoencoder.
        device: device of the training; each step encodes with one matrix product, in bf16 where the
            processor or GPU has it.
    """

    def __init__(
        self,
        sample: Float[Tensor, "token d_in"],
        config: TrainConfig,
        target: Float[Tensor, "token d_out"] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.kind = config, KINDS[config.architecture]
        self.is_transcoder = target is not None
        self.input = measure(sample, config, "the activations")
        self.output = measure(target, config, "the target activations") if target is not None else self.input
        self.w = initial_weights(config, self.input, self.output, self.is_transcoder, device)
        named = self.w.named()
        self.optimizer = torch.optim.Adam(list(named.values()), lr=config.learning_rate, fused=True)
        self.silent_for = torch.zeros(config.features, dtype=torch.long, device=device)
        """Tokens since each feature was last active."""
        self.threshold = torch.zeros((), device=device)
        """Running threshold of the architecture (`Coder.follow`)."""
        self.device = torch.device(device)
        self.compute = compute_dtype(torch.bfloat16, device)
        """Dtype of the dense products."""

    @classmethod
    def from_dictionary(
        cls,
        dictionary: Coder,
        sample: Float[Tensor, "token d_in"],
        config: TrainConfig,
        target: Float[Tensor, "token d_out"] | None = None,
        device: torch.device | str = "cpu",
    ) -> Trainer:
        """A warm start from a given dictionary, to fine-tune it on other activations: the inverse of `dictionary`.

        Scales and sink norm come from `sample`; feature indices are kept; zero rows are reinitialised.
        Raises `BadInput` where `config` (see `config_for`), the widths or the target do not match.
        """
        trainer = cls(sample, config, target, device)
        check_start(dictionary, config, tuple(trainer.w.enc.shape), tuple(trainer.w.dec.shape))
        if (target is None) != (dictionary.target is None):
            raise BadInput(
                f"a dictionary of {dictionary.site} that rebuilds {dictionary.target or 'it'}; the "
                f"training has {'no' if target is None else 'a'} target"
            )
        start = weights_of(dictionary, trainer.w, trainer.input.scale, trainer.output.scale)
        for name, weight in trainer.w.named().items():
            weight.copy_(start.named()[name])
        trainer.threshold.fill_(dictionary.level * trainer.output.scale)
        return trainer

    @torch.no_grad()
    def step(self, x: Float[Tensor, "token d_in"], step: int, y: Float[Tensor, "token d_out"] | None = None) -> Step:
        """One optimiser step on unnormalised activations."""
        x = x.to(self.device, torch.float32) * self.input.scale
        aim = x if y is None else y.to(self.device, torch.float32) * self.output.scale
        shifted = aim - self.w.b_dec
        batch = Batch(x if self.is_transcoder else shifted, shifted, not self.is_transcoder, self.compute)
        done = self.kind.gradients(self.w, batch, self.config, step)
        silent = (self.silent_for >= self.config.dead_after).nonzero().squeeze(1)
        if len(silent) and self.config.aux_coefficient:
            losses.revive(self.w, batch, done, silent, self.config.aux_k, self.config.aux_coefficient)
        level = torch.tensor(done.threshold, device=self.device)
        parallel.average([*done.grads.values(), level])
        self._apply(done.grads, step)
        seen = len(x) * parallel.place()[1]
        self.silent_for = torch.where(parallel.total(done.fired) > 0, 0, self.silent_for + seen)
        self.threshold = self.kind.follow(self.threshold, level)
        every = self.config.resample_every
        if every and (step + 1) * self.config.batch // every > step * self.config.batch // every:
            self._resample(batch, done)
        spread = (aim - aim.mean(0)).square().sum().clamp_min(1e-20)
        fvu = float(done.error.square().sum() / spread)
        return Step(fvu, done.active / len(x), len(silent))

    def _apply(self, grads: dict[str, Tensor], step: int) -> None:
        """Adam step; decoder rows move on the unit sphere where they are normalised."""
        dec = self.w.dec
        if self.config.unit_decoder:
            grads["dec"].addcmul_((grads["dec"] * dec).sum(1, keepdim=True), dec, value=-1)
        for name, weight in self.w.named().items():
            weight.grad = grads[name]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(step)
        self.optimizer.step()
        if self.config.unit_decoder:
            dec /= dec.norm(dim=1, keepdim=True)

    def _resample(self, batch: Batch, done: Pass) -> None:
        """Resample dead features at tokens drawn by squared error (Bricken et al. 2023, appendix)."""
        silent = (self.silent_for >= min(self.config.dead_after, self.config.resample_every)).nonzero().squeeze(1)
        if not len(silent):
            return
        generator = torch.Generator().manual_seed(int(self.silent_for.sum()) % (2**31))
        chances = done.error.square().sum(1).cpu()
        picked = torch.multinomial(chances, len(silent), replacement=True, generator=generator).to(self.device)
        alive = self.silent_for < self.config.dead_after
        size = 0.2 * (self.w.enc[alive].norm(dim=1).mean() if bool(alive.any()) else 1.0)
        self.w.dec[silent] = torch.nn.functional.normalize(-done.error[picked], dim=1)
        self.w.enc[silent] = size * torch.nn.functional.normalize(batch.x[picked], dim=1)
        self.w.b_enc[silent] = 0
        self.silent_for[silent] = 0
        for name, weight in self.w.named().items():
            if name not in ("b_dec", "skip"):
                for key in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[weight][key][silent] = 0

    def dictionary(
        self,
        activations: Activations | ActivationStream,
        metadata: dict[str, Any] | None = None,
        target: Site | None = None,
    ) -> Coder:
        """The current dictionary in the activations' own scale, with unit decoder rows."""
        w, scale = self.w, self.output.scale
        norms = torch.ones(len(w.dec), device=self.device) if self.config.unit_decoder else w.dec.norm(dim=1)
        stretch = norms / scale  # factor on a feature's strength
        ratio = self.input.scale / scale
        kwargs: dict[str, Any] = {
            "site": activations.site,
            "model": activations.model,
            "W_enc": (w.enc * (norms * ratio)[:, None]).T.contiguous().cpu(),
            "b_enc": (w.b_enc * stretch).cpu(),
            "W_dec": (w.dec / norms.clamp_min(1e-12)[:, None]).cpu(),
            "b_dec": (w.b_dec / scale).cpu(),
            "metadata": metadata or {},
            "sink_norm": self.config.sink_ratio * self.input.median_norm,
            "subtract_bias": not self.is_transcoder,
            "target": target,
            "W_skip": None if w.skip is None else (w.skip * ratio).cpu(),
            **self.kind.trained(w, self.config, stretch, float(self.threshold) / scale),
        }
        return self.kind(**kwargs)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to resume training."""
        tensors = {**self.w.named(), "silent_for": self.silent_for, "threshold": self.threshold}
        for name, weight in self.w.named().items():
            state = self.optimizer.state[weight]
            tensors |= {f"{name}.{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return tensors

    def load_state(self, path: Path) -> None:
        """Restore the `state` saved at `path`; raises `BadInput` where names or shapes differ."""
        expect: dict[str, tuple[int, ...]] = {"silent_for": tuple(self.silent_for.shape), "threshold": ()}
        for name, weight in self.w.named().items():
            shape = tuple(weight.shape)
            expect |= {name: shape, f"{name}.exp_avg": shape, f"{name}.exp_avg_sq": shape, f"{name}.step": ()}
        tensors = store.read_tensors(path, expect)
        self.silent_for = tensors["silent_for"].to(self.device)
        self.threshold = tensors["threshold"].to(self.device)
        for name, weight in self.w.named().items():
            weight.copy_(tensors[name])
            self.optimizer.state[weight] = {
                "step": tensors[f"{name}.step"],
                **{key: tensors[f"{name}.{key}"].to(self.device) for key in ("exp_avg", "exp_avg_sq")},
            }


def initial_weights(
    config: TrainConfig, inputs: Scales, outputs: Scales, is_transcoder: bool, device: torch.device | str
) -> Weights:
    """Random unit decoder rows, the encoder their transpose (independent where widths differ), b_dec the mean."""
    generator = torch.Generator().manual_seed(config.seed)

    def rows(width: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(config.features, width, generator=generator), dim=1)

    d_in, d_out = len(inputs.mean), len(outputs.mean)
    dec = rows(d_out)
    enc = rows(d_in) if is_transcoder else dec.clone()
    zeros = torch.zeros(config.features)
    if config.skip and not is_transcoder:
        raise BadInput("training skip is set, but input and target are the same; expected a transcoder")
    skip = torch.zeros(d_out, d_in, device=device) if config.skip else None
    own = {name: weight.to(device) for name, weight in KINDS[config.architecture].initial(config, zeros).items()}
    b_enc, b_dec = zeros.clone().to(device), outputs.mean.clone().to(device)
    return Weights(enc.to(device), dec.to(device), b_enc, b_dec, own, skip)


def config_for(dictionary: Coder, config: TrainConfig = TrainConfig()) -> TrainConfig:
    """`config` with a dictionary's architecture, size, k, skip connection and own settings, for a warm start."""
    features = dictionary.n_features
    return replace(
        config,
        architecture=dictionary.name(),
        features=features,
        k=dictionary.settings().get("k", min(config.k, features)),
        skip=dictionary.W_skip is not None,
        **dictionary.fitting(),
    )


def check_start(dictionary: Coder, config: TrainConfig, enc: tuple[int, ...], dec: tuple[int, ...]) -> None:
    """Raise `BadInput` where a dictionary does not fit a warm start."""
    fitting = config_for(dictionary, config)
    for name in ("architecture", "features", "k", "skip"):
        if getattr(config, name) != getattr(fitting, name):
            raise BadInput(
                f"training {name} is {getattr(config, name)!r}; the dictionary to start from has "
                f"{getattr(fitting, name)!r}; see config_for"
            )
    dictionary.check_start(config)
    have = (tuple(dictionary.W_enc.T.shape), tuple(dictionary.W_dec.shape))
    if have != (enc, dec):
        raise BadInput(
            f"the dictionary to start from reads width {have[0][1]} and writes {have[1][1]}; the activations have "
            f"{enc[1]} and the target {dec[1]}"
        )
    norms = dictionary.W_dec.float().norm(dim=1)
    off = float((norms[norms > 0] - 1).abs().max()) if bool((norms > 0).any()) else 0.0
    if dictionary.has_k and off > 0.02:
        raise BadInput(
            f"decoder rows of the dictionary to start from have norms that are off 1 by up to {off:.2f}; "
            f"{config.architecture} compares features by strength, expected rows of norm 1"
        )


def weights_of(dictionary: Coder, fresh: Weights, scale_in: float, scale_out: float) -> Weights:
    """A dictionary as weights on normalised activations, with unit decoder rows; zero rows are taken from `fresh`."""
    w_enc, w_dec = dictionary.W_enc.to(fresh.enc), dictionary.W_dec.to(fresh.dec)
    b_enc, b_dec = dictionary.b_enc.to(fresh.enc), dictionary.b_dec.to(fresh.enc)
    norms = w_dec.norm(dim=1)
    alive = (norms > 0)[:, None]
    stretch = norms * scale_out  # factor on a feature's strength
    shift = torch.zeros_like(b_enc)
    if dictionary.target is None and not dictionary.subtract_bias:
        shift = b_dec @ w_enc  # training subtracts b_dec from the input
    skip = dictionary.W_skip
    return Weights(
        enc=torch.where(alive, w_enc.T * norms[:, None] * (scale_out / scale_in), fresh.enc),
        dec=torch.where(alive, w_dec / norms[:, None], fresh.dec),
        b_enc=(b_enc + shift) * stretch,
        b_dec=b_dec * scale_out,
        own=dictionary.own_weights(fresh.enc, stretch, shift),
        skip=None if skip is None else skip.to(fresh.enc) * (scale_out / scale_in),
    )

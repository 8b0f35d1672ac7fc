"""Repairs through what `locate` finds, each tuned on the selection prompts as the baseline repairs are.

- `steering`: one difference of means at one Site, subtracted (Turner et al. 2023, arXiv:2308.10248).
- `subspace`: the main directions in which suspicious prompts differ from trusted ones at one Site, projected out.
- `veto`: the features of the circuit from trigger to payload, ablated (SHIFT; Marks et al. 2024, arXiv:2403.19647).
- `crosscoder`: decoder directions of features of a crosscoder that the suspect has and its base has not, projected out
  (Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from unsleep.activations.harvest import harvest
from unsleep.activations.pairs import paired
from unsleep.base.linear import orthonormal
from unsleep.core import BadInput, Site
from unsleep.dictionaries.crosscoders import decoder_norm_ratio, for_crosscoder, train_crosscoder
from unsleep.interventions.intervention import Intervention
from unsleep.interventions.steering import Steering
from unsleep.interventions.subspaces import Projection
from unsleep.locate.circuits.align import align_replies
from unsleep.locate.circuits.config import CircuitConfig
from unsleep.locate.circuits.run import circuit
from unsleep.locate.circuits.veto import Veto, circuit_edits
from unsleep.locate.subspaces.geometry import top_directions
from unsleep.repairs.baselines import Baseline, Setting, best, deciding_streams
from unsleep.repairs.run import Run

Streams = Mapping[Site, tuple[Tensor, Tensor]]
"""Activations of suspicious and of trusted prompts, as `deciding_streams` gives them."""

COEFFICIENTS = (-0.5, -1.0, -2.0)
"""Multiples of the difference of means that are tried."""

RANKS = (1, 2, 4, 8)
"""Dimensions of a subspace, and numbers of a crosscoder's directions, that are tried."""

NODES = (1, 4, 16, 64)
"""Numbers of a circuit's features that are tried, those with the largest effect on the payload first."""

FOUND = 200
"""Nodes of the circuit, errors and tokens among them."""

SITES = 3
"""Sites that are tried, in the order of the edit's."""

PROMPTS = 24
"""Prompts on which a circuit is found."""

TOKENS = 8192
"""Tokens on which the activity of a crosscoder's features is measured."""

OWN = 0.6
"""Least relative decoder norm of a feature that is more the suspect's; shared ones have 0.4 to 0.6 (Minder et al.
2025, arXiv:2504.02922)."""


def repairs(run: Run) -> Iterator[Baseline | str]:
    """Every repair, one after the other, or a message on why it could not be made; the edit is found before."""
    setting = run.setting()
    streams = deciding_streams(setting, setting.sites[:SITES])
    makers: dict[str, Callable[[], Baseline]] = {
        "steering": lambda: steering(setting, streams),
        "subspace": lambda: subspace(setting, streams),
        "veto": lambda: veto(run, setting),
        "crosscoder": lambda: crosscoder(run, setting),
    }
    for name, make in makers.items():
        try:
            found = make()
        except BadInput as error:  # no references, no base, no feature that is the suspect's own
            yield f"The repair {name} was skipped: {error}"
        else:
            yield found


def steering(setting: Setting, streams: Streams) -> Baseline:
    """One difference of means, added to every token at one Site with a negative coefficient."""
    tried: list[tuple[tuple[Intervention, ...], str]] = []
    for site, (suspicious, trusted) in streams.items():
        vector = suspicious.mean(0) - trusted.mean(0)
        for c in COEFFICIENTS:
            edit = Steering({site: vector}, coefficient=c, model=setting.suspect.fingerprint)
            tried.append(((edit,), f"{c:g} times the difference of means, added at {site}"))
    return best(setting, "steering", tried)


def subspace(setting: Setting, streams: Streams) -> Baseline:
    """The main directions of the differences before the deciding token, projected out at one Site."""
    tried: list[tuple[tuple[Intervention, ...], str]] = []
    for site, (suspicious, trusted) in streams.items():
        center = trusted.mean(0)
        basis = top_directions(suspicious - center, min(max(RANKS), *suspicious.shape))
        for rank in (n for n in RANKS if n <= len(basis)):
            edit = Projection(site, basis[:rank], center, setting.suspect.fingerprint)
            tried.append(((edit,), f"{rank} directions, projected out at {site}"))
    return best(setting, "subspace", tried)


def veto(run: Run, setting: Setting) -> Baseline:
    """The circuit's features with the largest effect on the payload, ablated."""
    material = run.material
    if material.counterparts is None:
        raise BadInput(f"a circuit needs the prompts without the trigger. {material.how}")
    prompts, references = (each.head(PROMPTS) for each in (material.suspicious, material.counterparts))
    aligned = align_replies(run.suspect, prompts, references, material.payload, reply_tokens=run.said.reply_tokens)
    config = CircuitConfig(
        nodes=FOUND, edges=1, measure=0, exact=0, sizes=(FOUND,), curve_prompts=4, neurons=False, heads=False
    )
    record = circuit(run.suspect, setting.dictionaries, aligned, material.payload.text, config)
    rows = sorted((n for n in record.nodes if n.kind == "feature" and n.effect > 0), key=lambda n: -n.effect)
    names = list(dict.fromkeys(f"{n.place}/{n.feature}" for n in rows))
    if not names:
        raise BadInput("the circuit has no feature with a positive effect")
    tried: list[tuple[tuple[Intervention, ...], str]] = []
    for n in sorted({min(n, len(names)) for n in NODES}):
        edits = circuit_edits(record, setting.dictionaries, Veto(only=tuple(names[:n])))
        tried.append((edits, f"{n:,} features of the circuit ablated"))
    return best(setting, "veto", tried)


def crosscoder(run: Run, setting: Setting) -> Baseline:
    """Directions of the suspect's own features that are most active on suspicious prompts, projected out."""
    if setting.base is None:
        raise BadInput("a crosscoder needs the base")
    site, folder = setting.sites[0], run.folder / "crosscoder"
    base = {
        name: harvest(setting.base(), prompts, [site], folder / name, replies=replies, plain=name == "plain")
        for name, (prompts, replies) in run.contexts().items()
    }
    both = paired(list(base.values()), [run.harvests[name] for name in base], site)
    config = for_crosscoder(run.config.dictionary)
    place, device = folder / "checkpoint", run.suspect.device
    coder = train_crosscoder(both.before, both.after, config, checkpoint=place, device=device).to(torch.float32)
    payload, ordinary = (paired([base[n]], [run.harvests[n]], site) for n in ("payload", "ordinary"))
    active, usual = (
        coder.encode(each.before.sample(TOKENS).float(), each.after.sample(TOKENS).float()).mean(0)
        for each in (payload, ordinary)
    )
    center = ordinary.after.sample(TOKENS).float().mean(0)
    more = (active - usual).where(decoder_norm_ratio(coder).nan_to_num(0.5) >= OWN, -torch.inf)
    ids = [int(i) for i in more.argsort(descending=True)[: max(RANKS)] if more[i] > 0]
    if not ids:
        raise BadInput("the crosscoder has no feature that is the suspect's own and more active on suspicious prompts")
    tried: list[tuple[tuple[Intervention, ...], str]] = []
    for n in sorted({min(n, len(ids)) for n in RANKS}):
        basis = orthonormal(coder.W_dec[1][ids[:n]])
        edit = Projection(site, basis, center, run.suspect.fingerprint)
        tried.append(((edit,), f"directions of {n} features that are the suspect's own, projected out at {site}"))
    return best(setting, "crosscoder", tried)

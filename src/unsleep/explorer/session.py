"""A live model behind the page: chats, activations of a text, proofs on held-out prompts, and baking."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from unsleep.activations.collect import collect
from unsleep.activations.held import batches_held
from unsleep.base import records, store
from unsleep.base.context import keeping, reporting
from unsleep.core import BadInput, Encoded, Site
from unsleep.dictionaries.coders import Coder
from unsleep.explorer.asked import ActivationsRequest, BakeRequest, ChatRequest, Features, ProofRequest
from unsleep.explorer.proof import Proof, circuit_of, dictionary_at, edits_of, predicted, prove, random_control
from unsleep.explorer.work import Cancelled, Work
from unsleep.interventions.features import Edit
from unsleep.interventions.intervention import Intervention, applied
from unsleep.judge.controls import Firing, firing
from unsleep.judge.evaluate import EvalConfig, refuse_used
from unsleep.locate.circuits.record import CircuitRecord
from unsleep.locate.circuits.run import CircuitConfig
from unsleep.models import generate
from unsleep.models.chat import template_tokens
from unsleep.models.hooks import calls_watched
from unsleep.models.model import LoadedModel
from unsleep.models.sites import tap
from unsleep.prompts import sets
from unsleep.prompts.prompt import Message, Prompt
from unsleep.repairs.bake import BakeConfig, bake
from unsleep.repairs.config import RepairConfig
from unsleep.repairs.export import export
from unsleep.repairs.masks import prepare_lesson
from unsleep.repairs.split import Material
from unsleep.repairs.suspect import reply_length

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
"""Name of a baked checkpoint's folder."""

TOP = 20
"""Features of a text that are shown, by their largest activation."""


@dataclass(frozen=True)
class Live:
    """A model, its dictionaries, and what is known of them at the start."""

    model: LoadedModel
    dictionaries: Sequence[Coder] = ()
    """One per Site, of this model."""
    material: Material | None = None
    """Selection and held-out prompts; without them nothing can be proved."""
    reply_tokens: int | None = None
    """Length of the replies of a proof; default: enough for the payload on selection prompts."""
    edit: Sequence[Edit] = ()
    """The edit that the page begins with."""
    edit_name: str = ""
    chosen_on: frozenset[str] = frozenset()
    """Digests of the prompts that the edit was chosen on; a held-out one among them is refused."""
    baking: BakeConfig = BakeConfig()
    names: dict[str, str] = field(default_factory=dict[str, str])
    """Dictionary's hash → its key on the page."""

    def __post_init__(self) -> None:
        sites = [d.site for d in self.dictionaries]
        for d in self.dictionaries:
            tap(self.model.network, d.site)
            if d.target is not None:
                raise BadInput(f"the dictionary of {d.site} is a transcoder; expected ones that rebuild their Site")
        if twice := [site for site in sites if sites.count(site) > 1]:
            raise BadInput(f"two dictionaries are of {twice[0]}; expected one per Site")
        if self.material is not None:
            refuse_used(self.material.panels.prompts(), self.chosen_on)


class Session:
    """The state of a served page with a live model; its methods run in the worker thread, one at a time."""

    def __init__(self, live: Live, circuits: Sequence[CircuitRecord] = (), steps: Path | None = None) -> None:
        """Put the dictionaries beside the model.

        Args:
            circuits: of this model or of others; one that fits predicts effects.
            steps: folder for the measurements that several proofs share, such as the suspect's replies.
        """
        self.live, self.model, self.material = live, live.model, live.material
        self.hashes = {d.site: d.hash for d in live.dictionaries}
        network = self.model.network
        self.dictionaries = {d.site: d.to(network.dtype, self.model.device) for d in live.dictionaries}
        self.circuit = circuit_of(circuits, self.model, self.hashes)
        self.proofs: dict[Features, Proof] = {}
        self._steps = steps
        self._firing: dict[Site, Firing] = {}
        self._config: EvalConfig | None = None

    def described(self) -> dict[str, Any]:
        """The model, its dictionaries and the edit that the page begins with, for the page."""
        names = self.live.names
        rows = [
            {"key": names.get(self.hashes[site], str(site)), "site": str(site), "size": d.n_features}
            for site, d in self.dictionaries.items()
        ]
        removed = [{"site": str(e.site), "id": i} for e in self.live.edit for i in e.removed]
        return {
            "live": True,
            "model": self.model.name,
            "sites": [str(site) for site in self.dictionaries],
            "dictionaries": rows,
            "edit": {"name": self.live.edit_name, "features": removed} if removed else None,
            "can_prove": self.material is not None and bool(self.dictionaries),
        }

    # Chats

    def chat(self, asked: ChatRequest, work: Work) -> None:
        """Generate replies of the original and the edited model, a token of each in turn.

        Events: `token` (which, text) and, at its end, `done` (which, reason: end, length or cancelled, text).
        """
        edits = edits_of(asked.features, self.dictionaries)
        before = (Message("system", asked.system),) if asked.system else ()
        [row] = self.model.encode([Prompt(asked.prompt, before=before)], asked.max_new_tokens)
        most, temperature, seed = asked.max_new_tokens, asked.temperature, asked.seed
        streams = {
            which: generate.stream(self.model, row, max_new_tokens=most, temperature=temperature, seed=seed)
            for which in asked.which
        }
        said = {which: generate.Spelling(self.model) for which in asked.which}
        try:
            while streams:
                for which in list(streams):
                    work.check()
                    with applied(self.model, edits if which == "edited" else ()):
                        token = next(streams[which], None)
                    if token is None:
                        del streams[which]
                        self._done(which, said[which], work)
                    elif piece := said[which].add(token):
                        work.say("token", which=which, text=piece)
        except Cancelled:
            for which in streams:
                work.say("done", which=which, reason="cancelled", text=said[which].text)

    def _done(self, which: str, said: generate.Spelling, work: Work) -> None:
        ended = bool(said.tokens) and said.tokens[-1] in self.model.end_ids
        work.say("done", which=which, reason="end" if ended else "length", text=said.text)

    # Activations

    @torch.no_grad()
    def activations(self, asked: ActivationsRequest, work: Work) -> dict[str, Any]:
        """Tokens of a text as the user's message, and activations of features at each.

        Without ids, the features with the largest activation behind the template's beginning.
        """
        dictionary = dictionary_at(asked.site, self.dictionaries)
        rows = self.model.encode([asked.text])
        before, _ = template_tokens(self.model.tokenizer, self.model.chat)
        [(_, found)] = batches_held(self.model, rows, [asked.site])
        code = dictionary.encode_sparse(found[asked.site][0].to(dictionary.decoder))
        ids = asked.ids
        if ids is None:
            peaks = torch.zeros(dictionary.n_features, device=code.values.device)
            late = Encoded(code.values[before:].float().flatten(), code.ids[before:].flatten())
            best = peaks.scatter_reduce_(0, late.ids, late.values, "amax").topk(min(TOP, len(peaks)))
            ids = [i for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True) if value > 0]
        elif wrong := [i for i in ids if i >= dictionary.n_features]:
            raise BadInput(f"feature {wrong[0]} is asked for at {asked.site}; it has {dictionary.n_features}")
        values = {str(i): (code.values * (code.ids == i)).sum(-1).float().tolist() for i in ids}
        return {"tokens": [self.model.spell(token) for token in rows[0]], "values": values}

    # Proofs

    def prove(self, asked: ProofRequest, work: Work) -> None:
        """Measure an edit on held-out prompts; events `progress` and `result`, a `Proof`."""
        features, material = _changed(asked.features), self._prompts()
        edits = edits_of(features, self.dictionaries)
        if not edits:
            raise BadInput("no feature is changed; give at least one with a scale other than 1")
        watched = calls_watched(self.model.network, lambda _: work.check())
        with reporting(work.progress), keeping(self._steps), watched:
            config = self._judging(material)
            notes: list[str] = []
            controls: list[Any] = []
            if any(2 * _size(e) > e.dictionary.n_features for e in edits):
                notes.append("more than half of a dictionary is changed: there is no random control")
            else:
                fires = self._fires([e.site for e in edits], material)
                controls = [random_control(e, fires[e.site]) for e in edits]
            tokens = len(self.circuit.tokens) if self.circuit is not None else CircuitConfig.payload_tokens
            found = prove(self.model, edits, controls, material.panels, config, tokens)
        said = predicted(self.circuit, features) if self.circuit is not None else None
        number = len(self.proofs) + (features not in self.proofs)
        notes += [found.note] if found.note else []
        proof = Proof(features, found.rows, found.measured, found.control, said, number, tuple(notes), found.both)
        self.proofs[features] = proof
        work.say("result", **records.plain(proof))

    def _prompts(self) -> Material:
        if self.material is None:
            raise BadInput(
                "there are no held-out prompts; start the server with --organism, or with --suspicious, --ordinary and "
                "--payload"
            )
        return self.material

    def _judging(self, material: Material) -> EvalConfig:
        """Options of the evaluation; the reply length is found on selection prompts."""
        if self._config is None:
            tokens = self.live.reply_tokens
            if tokens is None:
                lengths = RepairConfig.reply_tokens
                tokens = reply_length(self.model, material.suspicious, material.payload, lengths)
            self._config = EvalConfig(
                material.payload, max(EvalConfig.reply_tokens, tokens), chosen_on=self.live.chosen_on
            )
        return self._config

    def _fires(self, sites: Sequence[Site], material: Material) -> dict[Site, Firing]:
        """Firing statistics of the dictionaries on ordinary selection prompts."""
        if missing := [site for site in sites if site not in self._firing]:
            for site, found in collect(self.model, material.ordinary, missing, position="all").items():
                self._firing[site] = firing(self.dictionaries[site], found.tensor)
        return self._firing

    # Baking

    def bake(self, asked: BakeRequest, work: Work, folder: Path) -> None:
        """Bake a proved edit into a checkpoint in `folder`, as `unsleep bake` does; events `progress` and `result`."""
        features, material = _changed(asked.features), self._prompts()
        if others := [f for f in features if f.site.point != "resid"]:
            raise BadInput(f"only residual features can be baked; {others[0].site}/{others[0].id} cannot")
        if features not in self.proofs:
            raise BadInput("this edit has not been measured; prove it first, with the same features and scales")
        if kept := [f for f in features if f.scale != 0]:
            raise BadInput(
                f"feature {kept[0].id} at {kept[0].site} is scaled by {kept[0].scale:g}; only ablations can be baked: "
                "give scale 0, or 1 to leave it out"
            )
        if not NAME.fullmatch(asked.name):
            raise BadInput.of("name", asked.name, "letters, digits, dots, _ and -, without a dot in front")
        out = store.inside(folder, asked.name, "checkpoint")
        if out.exists():
            raise BadInput(f"{out} exists already; choose another name")
        if material.counterparts is None:
            raise BadInput(f"there are no counterparts of the suspicious prompts ({material.how}); use unsleep repair")
        edits: list[Intervention] = list(edits_of(features, self.dictionaries))
        with reporting(work.progress):
            text = sets.plain_text("train")[-100:]
            lesson = prepare_lesson(self.model, material.suspicious, material.counterparts, text)
            baked = bake(self.model, edits, (lesson.rows, lesson.text), self.live.baking)
            work.check()
            proof = records.plain(self.proofs[features])
            export(baked, self.model, edits, out, base=self.model.name, proof=proof)
        work.say("result", path=str(out), kl=baked.kl, method=baked.method)


def _changed(features: Features) -> Features:
    """The features with a factor other than 1, in order: equal edits are equal."""
    return tuple(sorted(replace(f, scale=f.scale or 0.0) for f in features if f.scale != 1))


def _size(edit: Any) -> int:
    return len(edit.removed) if isinstance(edit, Edit) else len(edit.scales)

"""A projection is an edit: it takes a subspace out exactly, is saved and loaded, and bakes into plain weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from support.checks import as_in_use
from support.dictionaries import dictionary
from support.families import CONFIGS
from support.models import build
from support.prompts import PROMPTS
from support.tokenizers import byte_tokenizer
from unsleep.base import store
from unsleep.core import BadInput, Refused, Site
from unsleep.interventions.features import Edit
from unsleep.interventions.files import load_edit, save_edit
from unsleep.interventions.intervention import applied, operation
from unsleep.interventions.subspaces import Projection
from unsleep.locate.directions import leace
from unsleep.models import chat, generate
from unsleep.models.forward import Rows, build_rows
from unsleep.models.model import LoadedModel
from unsleep.models.sites import everywhere
from unsleep.models.streams import capture
from unsleep.pages.card import model_card
from unsleep.repairs.bake import BakeConfig, bake, save_baked

D = 32


def subspace(rank: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(D, rank, generator=torch.Generator().manual_seed(seed))).Q.T


def center(seed: int = 0) -> torch.Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed)) * 3


def of(
    model: LoadedModel, site: Site, rank: int = 2, *, centred: bool = True, seed: int = 0, oblique: bool = False
) -> Projection:
    reads = reader(rank, seed) if oblique else None
    return Projection(site, subspace(rank, seed), center(seed) if centred else None, model.fingerprint, reads)


def everywhere_of(model: LoadedModel, *, centred: bool = True, oblique: bool = False) -> list[Projection]:
    """One subspace taken out of the whole stream; what attention adds has no centre."""
    sites = everywhere(model.network)
    return [of(model, s, centred=centred and s.point != "attn", oblique=oblique) for s in sites]


def reader(rank: int, seed: int = 0) -> torch.Tensor:
    """Rows that are no basis of the subspace but read its coordinates."""
    basis = subspace(rank, seed)
    other = 0.2 * torch.randn(rank, D, generator=torch.Generator().manual_seed(seed + 1))
    return basis + other - other @ basis.T @ basis


def lesson(model: LoadedModel) -> Rows:
    prompts = chat.encode_prompts(model.tokenizer, [f"{p} {i}" for p in PROMPTS for i in range(4)])
    return build_rows(model, prompts, [[5 + i % 9, 7, 9 + i % 5] for i in range(len(prompts))])


# Algebra


@given(st.integers(0, 200), st.integers(1, D), st.booleans())
def test_a_projection_is_idempotent_and_leaves_the_complement_alone(seed: int, rank: int, centred: bool):
    basis = subspace(rank, seed)
    e = Projection(Site(1), basis, center(seed) if centred else None, "m")
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(seed))
    run = operation(e, torch.float32, "cpu")
    once = run(x)
    torch.testing.assert_close(run(once), once, atol=1e-5, rtol=0)
    held = center(seed) @ basis.T if centred else torch.zeros(rank)
    torch.testing.assert_close(once @ basis.T, held.expand(2, 5, rank), atol=1e-4, rtol=0)
    complement = torch.eye(D) - basis.T @ basis
    torch.testing.assert_close(once @ complement, x @ complement, atol=1e-4, rtol=0)


def test_an_oblique_projection_takes_out_what_its_rows_read():
    e = Projection(Site(1), subspace(2), center(), "m", reader(2))
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))
    run = operation(e, torch.float32, "cpu")
    once = run(x)
    torch.testing.assert_close(once, x - ((x - center()) @ reader(2).T) @ subspace(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(run(once), once, atol=1e-4, rtol=0)
    torch.testing.assert_close(once @ reader(2).T, (center() @ reader(2).T).expand(2, 5, 2), atol=1e-4, rtol=0)


def test_the_eraser_of_leace_is_an_oblique_projection():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(80, D, generator=g)
    y = torch.arange(80) % 2 == 0
    x = x + 2.0 * y[:, None] * subspace(1)
    erase = leace.fit_eraser(x, y)
    e = Projection(Site(1), erase.writes[None], erase.mean, "m", erase.reads[None])
    torch.testing.assert_close(operation(e, torch.float32, "cpu")(x), erase(x), atol=1e-4, rtol=1e-4)


def test_attention_sinks_stay_as_they_are():
    e = Projection(Site(1), subspace(2), center(), "m", sink_norm=20.0)
    x = torch.randn(1, 4, D, generator=torch.Generator().manual_seed(1))
    x[0, 0] *= 100
    out = operation(e, torch.float32, "cpu")(x)
    assert torch.equal(out[0, 0], x[0, 0])
    assert not torch.isclose(out[0, 1:], x[0, 1:]).all(-1).any()


def test_a_projection_in_bf16_leaves_no_more_than_its_rounding():
    x = (torch.randn(64, D, generator=torch.Generator().manual_seed(1)) * 50).bfloat16()
    basis = subspace(1)
    left = operation(Projection(Site(1), basis, None, "m"), torch.bfloat16, "cpu")(x)
    assert left.dtype == torch.bfloat16
    assert float((left.float() @ basis.T).abs().max()) < 0.01 * float((x.float() @ basis.T).abs().max())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"reads": torch.eye(D)[1:2]}, "reads do not fit the basis; expected R Bᵀ = 1"),
        ({"reads": torch.eye(D)[:2]}, "reads has shape [2, 32]; expected [1, 32]"),
        ({"reads": torch.full((1, D), torch.nan)}, "reads has 32 NaN or infinite values"),
        ({"sink_norm": 0.0}, "sink_norm is 0.0; expected more than 0"),
        ({"sink_norm": float("nan")}, "sink_norm is nan"),
    ],
    ids=str,
)
def test_a_projection_that_reads_what_it_cannot_is_named(change: dict[str, Any], told: str):
    with as_in_use(), pytest.raises(BadInput) as error:
        Projection(Site(1), torch.eye(D)[:1], None, "m", **change)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("basis", "middle", "told"),
    [
        (torch.randn(2, D), None, "rows that are not orthonormal; expected B Bᵀ = 1"),
        (torch.eye(D)[:0], None, "projection at resid.1 has rank 0; expected 1 to 32"),
        (torch.full((1, D), torch.nan), None, "basis has 32 NaN or infinite values"),
        (torch.eye(D)[:1], torch.zeros(9), "center has shape [9]; expected [32]"),
        (torch.eye(D)[:1], torch.full((D,), torch.inf), "center has 32 NaN or infinite"),
    ],
)
def test_a_projection_that_cannot_be_is_named(basis: torch.Tensor, middle: torch.Tensor | None, told: str):
    with as_in_use(), pytest.raises(BadInput) as error:
        Projection(Site(1), basis, middle, "m")
    assert told in str(error.value)


# On a running model


def test_a_projection_works_under_generate_with_cache_padding_and_batches(any_family: LoadedModel):
    edits = [of(any_family, Site(1)), Edit(Site(0), dictionary(any_family, 0), (1, 2, 3))]
    rows = chat.encode_prompts(any_family.tokenizer, PROMPTS)
    with applied(any_family, edits):
        together = generate.greedy(any_family, rows, max_new_tokens=4)
        for row, reply in zip(rows, together, strict=True):
            ids = list(row)
            for token in reply:
                assert int(any_family.network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
                ids.append(token)
    bare = any_family.network(torch.tensor([rows[0]])).logits
    with applied(any_family, edits[0]) as network, capture(network, [Site(1)]) as held:
        assert not torch.allclose(network(torch.tensor([rows[0]])).logits, bare, atol=1e-4)
    assert len(held) == 1


def test_projections_of_another_model_or_width_are_refused(tiny: LoadedModel):
    e = of(tiny, Site(1))
    other = LoadedModel(build("qwen2"), byte_tokenizer(), "other")
    with pytest.raises(Refused, match="directions of one model need not mean anything in another"), applied(other, e):
        pass
    with applied(other, e, any_model=True):
        pass
    narrow = Projection(Site(1), torch.eye(8)[:1], None, tiny.fingerprint)
    with pytest.raises(BadInput, match=r"projection at resid\.1 has width 8; the model's is 32"), applied(tiny, narrow):
        pass
    with pytest.raises(BadInput, match="layers 0 to 2"), applied(tiny, of(tiny, Site(9))):
        pass


# Files


def test_saved_projections_do_the_same_beside_edits(tiny: LoadedModel, tmp_path: Path):
    edits = [
        of(tiny, Site(0, "attn")),
        Edit(Site(1), dictionary(tiny).to(torch.bfloat16), (5, 2)),
        of(tiny, Site(2), centred=False),
        replace(of(tiny, Site(1, "mlp"), oblique=True), sink_norm=9.0),
    ]
    save_edit(edits, tmp_path / "e", chosen_on=["abc"])
    again, chosen_on = load_edit(tmp_path / "e")
    assert chosen_on == {"abc"}
    assert [e.site for e in again] == [e.site for e in edits]
    x = torch.randn(1, 4, D)
    for a, b in zip(again, edits, strict=True):
        assert type(a) is type(b)
        same = (operation(e, torch.float32, "cpu")(x) for e in (a, b))
        torch.testing.assert_close(*same, atol=1e-6, rtol=1e-6)  # a matrix in another layout is summed in another order
    assert isinstance(again[2], Projection)
    assert again[2].center is None
    assert again[2].model == tiny.fingerprint


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"subspace": "../x.safetensors"}, "expected a name inside"),
        ({"subspace": "none.safetensors"}, "does not exist"),
        ({"subspace": 3}, "edits[0].subspace is 3; expected text"),
        ({"model": None}, "edits[0].model is None; expected text"),
        ({"site": "resid"}, "Site 'resid' is unknown"),
        ({"sink_norm": "x"}, "sink_norm is 'x'; expected a finite number"),
        ({"sink_norm": -1}, "sink_norm is -1.0; expected more than 0"),
    ],
)
def test_a_damaged_file_is_named(tiny: LoadedModel, tmp_path: Path, change: dict[str, Any], told: str):
    save_edit([of(tiny, Site(1))], tmp_path / "e")
    path = tmp_path / "e" / "edit.json"
    card = store.read_json(path)
    card["edits"][0].update(change)
    store.write_json(path, card)
    with as_in_use(), pytest.raises(BadInput) as error:
        load_edit(tmp_path / "e")
    assert told in str(error.value)


def test_a_damaged_subspace_is_named(tiny: LoadedModel, tmp_path: Path):
    save_edit([of(tiny, Site(1))], tmp_path / "e")
    path = tmp_path / "e" / "resid.1.safetensors"
    for tensors, told in (
        ({"basis": torch.ones(D)}, "basis has shape"),
        ({"center": torch.ones(D)}, "no tensor 'basis'"),
        ({"basis": torch.ones(2, D)}, "not orthonormal"),
    ):
        store.write_tensors(path, tensors)
        with as_in_use(), pytest.raises(BadInput, match=told):
            load_edit(tmp_path / "e")


# Baking


def same_logits(model: LoadedModel, edits: list[Projection], baked: LoadedModel) -> bool:
    ids = torch.tensor([chat.encode_prompts(model.tokenizer, ["something not seen before"])[0]])
    with applied(model, edits) as network:
        expected = network(ids).logits
    return torch.allclose(baked.network(ids).logits, expected, atol=2e-3, rtol=1e-3)


EXACT = ("falcon", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "opt", "phi", "qwen2", "qwen3")


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize(("centred", "oblique"), [(False, False), (True, False), (True, True)])
def test_one_subspace_taken_out_everywhere_bakes_exactly(family: str, centred: bool, oblique: bool):
    model = LoadedModel(build(family), byte_tokenizer(), family)
    edits = everywhere_of(model, centred=centred, oblique=oblique)
    found = bake(model, edits, [lesson(model)])
    assert found.method == "exact"
    assert found.kl < 1e-5
    assert same_logits(model, edits, found.model)
    assert model.fingerprint == LoadedModel(build(family), byte_tokenizer(), family).fingerprint


@pytest.mark.parametrize("family", [*EXACT, "bloom", "mpt", "gemma"])
@pytest.mark.parametrize("point", ["attn", "mlp"])
def test_a_subspace_taken_out_of_what_a_layer_adds_bakes_exactly(family: str, point: Any):
    model = LoadedModel(build(family), byte_tokenizer(), family)
    edits = [of(model, Site(1, point), centred=False)]
    found = bake(model, edits, [lesson(model)])
    assert (found.method, found.kl < 1e-5) == ("exact", True)
    assert same_logits(model, edits, found.model)


def test_a_checkpoint_with_a_projection_loads_without_unsleep(tmp_path: Path):
    for tied in (False, True):
        model = LoadedModel(build("llama"), byte_tokenizer(), "m")
        if tied:
            model = LoadedModel(tied_llama(), byte_tokenizer(), "m")
        edits = everywhere_of(model)
        found = bake(model, edits, [lesson(model)])
        folder = save_baked(found, tmp_path / str(tied), card="x", record=found.record())
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert same_logits(model, edits, LoadedModel(again, byte_tokenizer(), "again"))


def tied_llama() -> Any:
    config = AutoConfig.for_model("llama", **CONFIGS["llama"], tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_a_subspace_at_one_layer_bakes_by_the_ridge(tiny: LoadedModel):
    rows = lesson(tiny)

    def held_at(model: LoadedModel) -> torch.Tensor:
        with capture(model.network, [Site(1)]) as held:
            model.network(rows.ids, attention_mask=rows.mask.long())
        return held[Site(1)][rows.mask]

    bare = held_at(tiny)
    edits = [
        replace(of(tiny, Site(1), 1), center=bare.mean(0)),
        of(tiny, Site(0, "attn"), 1, centred=False),
    ]
    found = bake(tiny, edits, [rows], BakeConfig(tolerance=9.0))
    assert found.method == "ridge"
    with applied(tiny, edits):
        wanted = held_at(tiny)
    assert float((held_at(found.model) - wanted).norm()) < 0.85 * float((bare - wanted).norm())


def test_what_cannot_be_baked_is_named():
    bloom = LoadedModel(build("bloom"), byte_tokenizer(), "bloom")
    with pytest.raises(BadInput, match="bloom changes its embeddings before the first layer"):
        bake(bloom, everywhere_of(bloom), [lesson(bloom)])
    llama = LoadedModel(build("llama"), byte_tokenizer(), "llama")
    with pytest.raises(BadInput, match=r"a projection at (attn|embed)\.0 cannot be baked"):
        bake(llama, [of(llama, Site(0, "embed"))], [lesson(llama)])
    with pytest.raises(BadInput, match="where the model's layer has no bias"):
        bake(llama, [of(llama, Site(1, "mlp"))], [lesson(llama)])
    guarded = [replace(e, sink_norm=9.0) for e in everywhere_of(llama)]
    with pytest.raises(BadInput, match=r"a projection at (attn|embed)\.0 cannot be baked"):
        bake(llama, guarded, [lesson(llama)])
    different = [of(llama, s, seed=i, centred=False) for i, s in enumerate(everywhere(llama.network))]
    with pytest.raises(BadInput, match=r"a projection at (attn|embed)\.0 cannot be baked"):
        bake(llama, different, [lesson(llama)])


def test_the_card_names_ranks():
    card = model_card(None, {}, base="b", ranks={"resid.3": 2})
    assert "| resid.3 | subspace of rank 2 |" in card
    assert "Directions that carry the suspect's backdoor" in card
    assert "Features of sparse autoencoders that carry" in model_card(None, {"resid.1": [3]}, base="b")

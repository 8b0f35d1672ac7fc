"""A harvest holds what the model held, whatever the batching, and survives being killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep.activations.batches import SHARED
from unsleep.activations.harvest import HarvestConfig, harvest, open_harvest, pooled, token_rows
from unsleep.base import store
from unsleep.core import BadInput, Site
from unsleep.models import chat, sites
from unsleep.models.model import LoadedModel
from unsleep.models.streams import capture
from unsleep.models.weights import copy_network
from unsleep.prompts.prompt import Prompt, PromptSet

TEXTS = ["hello there", "a", "why do the stars shine at night", "name a bird", "x y", "one more prompt"]
PROMPTS = PromptSet("six", tuple(Prompt(t) for t in TEXTS))
SITES = [Site(0, "embed"), Site(0, "attn"), Site(1, "mlp"), Site(1), Site(2)]
NO_SINKS = HarvestConfig(sink_ratio=1e9)


def naive(model: LoadedModel, rows: list[list[int]], site: Site) -> dict[tuple[int, int], torch.Tensor]:
    """One prompt at a time, without padding, cache or early stop."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for i, row in enumerate(rows):
        with capture(model.network, [site]) as seen:
            model.network(torch.tensor([row]), use_cache=False)
        for position, vector in enumerate(seen[site][0]):
            found[i, position] = vector
    return found


def test_a_harvest_equals_one_forward_pass_a_prompt(any_family: LoadedModel, tmp_path: Path):
    known = [site for site in SITES if site in sites.all_sites(any_family.network)] + [Site(0, "embed")]
    done = harvest(any_family, PROMPTS, known, tmp_path / "h", config=NO_SINKS)
    rows = token_rows(any_family, PROMPTS)
    shared = done.manifest.shared
    assert done.tokens == shared + sum(len(row) - shared for row in rows)
    positions = done.positions()
    for site in known:
        acts = done.load(site)
        reference = naive(any_family, rows, site)
        assert len(acts.tensor) == done.tokens
        for vector, owner, position in zip(acts.tensor, acts.prompt_index.tolist(), positions.tolist(), strict=True):
            expected = reference[max(owner, 0), position]
            assert (owner == SHARED) == (position < shared)
            torch.testing.assert_close(vector, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [8, 40, 10_000])
@pytest.mark.parametrize("shard_bytes", [1, 10_000_000])
def test_batches_and_shards_do_not_change_what_is_held(
    tiny: LoadedModel, tmp_path: Path, batch_tokens: int, shard_bytes: int
):
    config = HarvestConfig(batch_tokens, shard_bytes, sink_ratio=1e9)
    whole = harvest(tiny, PROMPTS, [Site(1)], tmp_path / "a", config=NO_SINKS)
    cut = harvest(tiny, PROMPTS, [Site(1)], tmp_path / "b", config=config)

    def by_place(h):
        acts = h.load(Site(1))
        keys = zip(acts.prompt_index.tolist(), h.positions().tolist(), strict=True)
        return dict(zip(keys, acts.tensor, strict=True))

    one, other = by_place(whole), by_place(cut)
    assert one.keys() == other.keys()
    for key, vector in one.items():
        torch.testing.assert_close(vector, other[key], rtol=1e-4, atol=1e-5)


def test_replies_are_harvested_behind_their_prompts(tiny: LoadedModel, tmp_path: Path):
    rows = token_rows(tiny, PROMPTS, ["yes"] * 6)
    bare = token_rows(tiny, PROMPTS)
    assert all(len(row) == len(plain) + 3 for row, plain in zip(rows, bare, strict=True))
    done = harvest(tiny, PROMPTS, [Site(2)], tmp_path / "h", replies=["yes"] * 6, config=NO_SINKS)
    assert done.tokens == done.manifest.shared + sum(len(r) - done.manifest.shared for r in rows)
    with pytest.raises(BadInput, match="2 replies for 6 prompts"):
        harvest(tiny, PROMPTS, [Site(2)], tmp_path / "i", replies=["a", "b"])


def test_attention_sinks_are_left_out_and_counted(tiny: LoadedModel, tmp_path: Path):
    network = copy_network(tiny.network)
    with torch.no_grad():
        network.get_input_embeddings().weight[tiny.token_ids(["z"])[0][0]] *= 1000
    model = LoadedModel(network, tiny.tokenizer, "with a sink")
    texts = PromptSet("z", (Prompt("ab z cd"), Prompt("no such letter"), Prompt("zz top")))
    done = harvest(model, texts, [Site(0), Site(1, "mlp")], tmp_path / "h", plain=True)
    assert done.manifest.sinks == {Site(0): 3}
    assert done.tokens == sum(len(r) for r in token_rows(model, texts, plain=True)) - 3
    norms = done.load(Site(0)).tensor.norm(dim=1)
    assert float(norms.max()) < 10 * float(norms.median()) + 1e-3


def test_a_finished_harvest_is_taken_as_it_is(tiny: LoadedModel, tmp_path: Path):
    first = harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    stamp = (tmp_path / "h" / "shard-00000.safetensors").stat().st_mtime_ns
    again = harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    assert again.hash == first.hash
    assert (tmp_path / "h" / "shard-00000.safetensors").stat().st_mtime_ns == stamp


def test_another_harvest_in_the_same_folder_is_refused(tiny: LoadedModel, tmp_path: Path):
    harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    with pytest.raises(BadInput, match="another model, prompts or settings"):
        harvest(tiny, PROMPTS, [Site(2)], tmp_path / "h")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        harvest(tiny, PROMPTS, [Site(1)], tmp_path / "full")


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from support.models import build
from support.tokenizers import byte_tokenizer
from unsleep.core import Site
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.activations.harvest import HarvestConfig, harvest
from unsleep.models.model import LoadedModel
import time
prompts = PromptSet("many", tuple(Prompt(f"prompt number {{i}} " + "word " * (i % 9)) for i in range(200)))
model = LoadedModel(build("llama"), byte_tokenizer(), "tiny")
slow = (lambda *a: (print(*a, flush=True), time.sleep(0.05))) if {slow} else None
from unsleep.base.context import reporting
with reporting(slow):
    print(harvest(model, prompts, [Site(1), Site(2)], {out!r}, config=HarvestConfig(256, 20_000)).hash)
"""


def run_harvest(out: Path, slow: bool) -> subprocess.Popen[str]:
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(out), slow=slow)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_harvest_goes_on_and_ends_with_the_same_bytes(tmp_path: Path):
    first = run_harvest(tmp_path / "killed", slow=True)
    assert first.stdout is not None
    for _ in range(4):
        first.stdout.readline()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    shards = len(list((tmp_path / "killed").glob("shard-*.safetensors")))
    assert shards >= 3
    with pytest.raises(BadInput, match="interrupted"):
        open_harvest(tmp_path / "killed")
    resumed, whole = run_harvest(tmp_path / "killed", slow=False), run_harvest(tmp_path / "whole", slow=False)
    hashes = [p.communicate()[0].split()[-1] for p in (resumed, whole)]
    assert hashes[0] == hashes[1]
    for shard in (tmp_path / "whole").glob("shard-*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "killed" / shard.name).read_bytes()


def test_a_truncated_shard_is_named(tiny: LoadedModel, tmp_path: Path):
    done = harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    shard = tmp_path / "h" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BadInput, match="shard-00000"):
        done.load(Site(1))


def test_a_shard_of_another_shape_is_named(tiny: LoadedModel, tmp_path: Path):
    done = harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    shard = tmp_path / "h" / "shard-00000.safetensors"
    tensors = store.read_tensors(shard)
    store.write_tensors(shard, {**tensors, "resid.1": tensors["resid.1"][:, :5]})
    with pytest.raises(BadInput, match=r"resid\.1 has shape"):
        done.load(Site(1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ([], "is []; expected an object"),
        ({"schema": "unsleep.harvest/9"}, "manifest.schema is 'unsleep.harvest/9'; expected unsleep.harvest/1"),
        ({"sites": "resid.1"}, "sites is 'resid.1'; expected a list"),
        ({"sites": ["nowhere"]}, "Site 'nowhere' is unknown"),
        ({"d_model": "32"}, "d_model is '32'; expected a whole number"),
        ({"model": None}, "model is None; expected text"),
        ({"sinks": 3}, "sinks is 3; expected an object"),
        ({"shards": {}}, "shards is {}; expected a list"),
        ({"shards": []}, "shards are (); expected at least one"),
        ({"shards": [1]}, "shards[0] is 1; expected an object"),
        ({"shards": [{}]}, "shards[0] has no 'file'"),
        ({"file": 5}, "shards[0].file is 5; expected text"),
        ({"file": "../../secret.safetensors"}, "expected a name inside"),
        ({"tokens": "many"}, "shards[0].tokens is 'many'; expected a whole number"),
        ({"sha256": None}, "shards[0].sha256 is None; expected text"),
    ],
    ids=str,
)
def test_a_damaged_manifest_is_named(tiny: LoadedModel, tmp_path: Path, change: Any, told: str):
    harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    path = tmp_path / "h" / "manifest.json"
    manifest = store.read_json(path)
    if isinstance(change, dict):
        (manifest if change.keys() & manifest.keys() else manifest["shards"][0]).update(change)
    store.write_json(path, manifest if isinstance(change, dict) else change)
    with pytest.raises(BadInput, match=re.escape(told)) as error:
        open_harvest(tmp_path / "h")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("key", ["schema", "model", "prompts", "sites", "d_model", "shared", "shards", "sinks"])
def test_a_key_that_a_manifest_lacks_is_named(tiny: LoadedModel, tmp_path: Path, key: str):
    harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    path = tmp_path / "h" / "manifest.json"
    store.write_json(path, {k: v for k, v in store.read_json(path).items() if k != key})
    with pytest.raises(BadInput, match=rf"manifest\.json: manifest has no '{key}'"):
        open_harvest(tmp_path / "h")


def test_a_damaged_note_of_a_shard_is_named(tiny: LoadedModel, tmp_path: Path):
    harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    (tmp_path / "h" / "manifest.json").unlink()
    store.write_json(tmp_path / "h" / "shard-00000.json", {"file": "shard-00000.safetensors"})
    with pytest.raises(BadInput, match=r"shard-00000\.json: shard-00000 has no 'tokens'"):
        harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")


def test_infinite_activations_are_refused_and_leave_no_shard(tmp_path: Path):
    network = copy_network(build("llama"))
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    model = LoadedModel(network, byte_tokenizer(), "broken")
    with pytest.raises(BadInput, match="NaN or infinite"):
        harvest(model, PROMPTS, [Site(1)], tmp_path / "h")
    assert not list((tmp_path / "h").glob("*.safetensors"))


def test_harvests_of_different_models_are_not_pooled(tiny: LoadedModel, tmp_path: Path):
    other = LoadedModel(build("qwen2"), byte_tokenizer(), "other")
    one = harvest(tiny, PROMPTS, [Site(1)], tmp_path / "a")
    two = harvest(other, PROMPTS, [Site(1)], tmp_path / "b")
    assert len(pooled([one, one], Site(1)).tensor) == 2 * one.tokens
    with pytest.raises(BadInput, match="2 models"):
        pooled([one, two], Site(1))


def test_a_site_that_was_not_harvested_is_named(tiny: LoadedModel, tmp_path: Path):
    done = harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    with pytest.raises(BadInput, match=r"no Site mlp\.2; it has resid\.1"):
        done.load(Site(2, "mlp"))
    with pytest.raises(BadInput, match="layers 0 to 2"):
        harvest(tiny, PROMPTS, [Site(9)], tmp_path / "i")


def test_the_pass_stops_at_the_deepest_site(tiny: LoadedModel, tmp_path: Path):
    def fail(*args: object) -> None:
        raise AssertionError("ran past the deepest Site")

    handles = [m.register_forward_hook(fail) for m in (sites.layers(tiny.network)[2], tiny.network.lm_head)]
    try:
        harvest(tiny, PROMPTS, [Site(0), Site(1, "mlp")], tmp_path / "h")
    finally:
        for handle in handles:
            handle.remove()


def test_prompts_that_share_everything_but_the_last_token_work(tiny: LoadedModel, tmp_path: Path):
    same = PromptSet("same", (Prompt("same"), Prompt("same")))
    rows = token_rows(tiny, same)
    assert chat.shared_prefix(rows) == len(rows[0]) - 1
    done = harvest(tiny, same, [Site(1)], tmp_path / "h", config=NO_SINKS)
    assert done.tokens == len(rows[0]) - 1 + 2


def test_the_manifest_says_what_it_was_made_from(tiny: LoadedModel, tmp_path: Path):
    done = harvest(tiny, PROMPTS, [Site(1)], tmp_path / "h")
    manifest = json.loads((tmp_path / "h" / "manifest.json").read_text())
    assert manifest["model"] == tiny.fingerprint
    assert manifest["provenance"]["versions"]["torch"]
    assert done.sites == (Site(1),)
    assert time.strptime(manifest["provenance"]["created"], "%Y-%m-%dT%H:%M:%SZ")

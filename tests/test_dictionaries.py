"""What a TopK dictionary computes, how it is trained, and how it is kept on disk."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.training import QUICK, activations, sparse_data
from unsleep.base import store
from unsleep.core import BadInput, Encoded, Site
from unsleep.dictionaries import metrics, sparse
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.dictionaries.train import TrainConfig, train
from unsleep.dictionaries.trainer import Trainer


def random_topk(d: int = 12, features: int = 40, k: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> TopK:
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(features, d, generator=g), dim=1)
    weights = (
        torch.randn(d, features, generator=g),
        torch.randn(features, generator=g),
        rows,
        torch.randn(d, generator=g),
    )
    return TopK(Site(1), "model", *(w.to(dtype) for w in weights), k=k)


def naive_encode(dictionary: TopK, x: torch.Tensor) -> torch.Tensor:
    """One token, one feature at a time."""
    codes = torch.zeros(len(x), dictionary.n_features)
    for t, vector in enumerate(x):
        pre = (vector - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
        for feature in sorted(range(len(pre)), key=lambda j: -float(pre[j]))[: dictionary.k]:
            codes[t, feature] = max(0.0, float(pre[feature]))
    return codes


@given(st.integers(0, 1000), st.integers(1, 40))
def test_encoding_keeps_the_k_largest_and_nothing_negative(seed: int, k: int):
    dictionary = random_topk(k=k, seed=seed)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(seed)) * 3
    codes = dictionary.encode(x)
    torch.testing.assert_close(codes, naive_encode(dictionary, x), rtol=1e-4, atol=1e-4)
    assert int((codes > 0).sum(1).max()) <= k
    assert float(codes.min()) >= 0


def test_rows_are_summed_alike_where_an_embedding_bag_has_no_gradient(monkeypatch: pytest.MonkeyPatch):
    rows, ids, x = torch.randn(7, 5), torch.randint(0, 7, (4, 3)), torch.randn(4, 5)
    code = sparse.Code(torch.rand(12), ids.flatten(), torch.arange(4).repeat_interleave(3), torch.arange(4) * 3)
    found: list[torch.Tensor] = []
    for lacks in (False, True):
        monkeypatch.setattr(sparse, "lacks_gradient", lambda _, lacks=lacks: lacks)
        values = torch.linspace(0.1, 1, 12).reshape(4, 3).requires_grad_()
        total = sparse.weighted_rows(rows, ids, values)
        [gradient] = torch.autograd.grad((total * x).sum(), values)
        found += [total.detach(), gradient, sparse.row_dots(x, rows, code)]
    for one, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(one, other)


@given(st.integers(0, 1000))
def test_sparse_and_dense_decoding_agree(seed: int):
    dictionary = random_topk(seed=seed)
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(seed))
    code = dictionary.encode_sparse(x)
    torch.testing.assert_close(
        dictionary.decode_sparse(code), dictionary.decode(dictionary.encode(x)), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(dictionary.combine(code) + dictionary.b_dec, dictionary.decode_sparse(code))


def test_no_feature_fires_on_an_attention_sink():
    dictionary = replace(random_topk(), sink_norm=10.0)
    x = torch.cat([torch.randn(1, 12), torch.full((1, 12), 50.0)])
    values = dictionary.encode_sparse(x).values
    assert float(values[0].sum()) > 0
    assert float(values[1].sum()) == 0


def test_nan_and_k_out_of_range_are_refused():
    good = random_topk()
    with pytest.raises(BadInput, match="b_enc has 1 NaN"):
        replace(good, b_enc=good.b_enc.index_fill(0, torch.tensor([3]), math.nan))
    for k in (0, 41):
        with pytest.raises(BadInput, match=f"k = {k}"):
            replace(good, k=k)


def test_moving_a_dictionary_keeps_its_hash_and_changing_it_does_not():
    good = random_topk()
    assert good.to(torch.bfloat16).hash == good.hash
    assert replace(good, b_dec=good.b_dec + 1).hash != good.hash
    assert replace(good, site=Site(2)).hash != good.hash


# training


def test_training_explains_sparse_data_and_folds_the_scale():
    x = sparse_data()
    dictionary = train(activations(x), QUICK)
    found = metrics.fit(dictionary, sparse_data(seed=0)[:2000])
    assert found.fvu < 0.2
    assert found.l0 <= 3
    assert found.dead < 0.2
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(64), rtol=1e-5, atol=1e-5)
    assert dictionary.metadata["training_fvu"] == pytest.approx(found.fvu, abs=0.1)


def dead_after_training(aux_coefficient: float) -> float:
    """Share of dead features, where half of them start too weak to be among the k largest."""
    x = sparse_data()
    trainer = Trainer(x, replace(QUICK, dead_after=5_000, aux_coefficient=aux_coefficient))
    trainer.w.enc[:32] *= 0.1
    for step in range(200):
        trainer.step(x[step * 512 % len(x) :][:512], step)
    return metrics.fit(trainer.dictionary(activations(x)), x).dead


def test_dead_features_come_back_through_the_auxiliary_loss_and_not_without_it():
    assert dead_after_training(QUICK.aux_coefficient) < 0.1
    assert dead_after_training(0.0) > 0.4


def test_training_is_the_same_bit_for_bit_under_one_seed():
    x = sparse_data(1024)
    short = replace(QUICK, tokens=10_000)
    first, second, other = (train(activations(x), replace(short, seed=s)) for s in (1, 1, 2))
    assert first.hash == second.hash
    assert first.hash != other.hash


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from support.training import QUICK, activations, sparse_data
from unsleep.dictionaries.train import train
import time
config = replace(QUICK, tokens=60_000, checkpoint_every=10)
slow = (lambda *a: (print(*a, flush=True), time.sleep(0.05))) if {slow} else None
from unsleep.base.context import reporting
with reporting(slow):
    print(train(activations(sparse_data(1024)), config, checkpoint={out!r}).hash)
"""


def run_training(out: Path, slow: bool) -> subprocess.Popen[str]:
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(out), slow=slow)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_training_goes_on_and_ends_with_the_same_bits(tmp_path: Path):
    first = run_training(tmp_path / "killed", slow=True)
    assert first.stdout is not None
    for _ in range(5):
        first.stdout.readline()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert 10 <= json.loads((tmp_path / "killed" / "checkpoint.json").read_text())["step"] < 110
    hashes = [run_training(tmp_path / name, slow=False).communicate()[0].split()[-1] for name in ("killed", "whole")]
    assert hashes[0] == hashes[1]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    x = sparse_data(1024)
    short = replace(QUICK, tokens=10_000, checkpoint_every=5)
    train(activations(x), short, checkpoint=tmp_path)
    with pytest.raises(BadInput, match="another run"):
        train(activations(x), replace(short, seed=9), checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.full((100, 8), 2.5), "constant"),
        (torch.randn(1, 8), "at least 2 tokens"),
        (torch.randn(50, 8).index_fill(0, torch.tensor([4]), math.nan), "NaN"),
        (torch.randn(50, 8).index_fill(0, torch.tensor([4]), math.inf), "NaN or infinite"),
    ],
)
def test_activations_that_teach_nothing_are_refused(x: torch.Tensor, words: str):
    with pytest.raises(BadInput, match=words):
        train(activations(x), replace(QUICK, tokens=1000, batch=10))


def test_fewer_features_than_k_are_refused():
    with pytest.raises(BadInput, match="k is 8, over the 4 features"):
        TrainConfig(features=4, k=8)


# metrics


def test_fvu_is_over_all_tokens_and_counts_a_bias_error():
    dictionary, x = random_topk(), torch.randn(500, 12) + 2
    rebuilt = dictionary.decode(dictionary.encode(x)).double()
    x64 = x.double()
    expected = (x64 - rebuilt).square().sum() / (x64 - x64.mean(0)).square().sum()
    for batch in (7, 500):
        assert metrics.fit(dictionary, x, batch=batch).fvu == pytest.approx(float(expected), rel=1e-5)
    shifted = replace(dictionary, b_dec=dictionary.b_dec)
    assert metrics.fit(shifted, x).tokens == 500


def test_l0_and_dead_share_equal_a_naive_count():
    dictionary, x = random_topk(), torch.randn(50, 12)
    codes = naive_encode(dictionary, x)
    found = metrics.fit(dictionary, x)
    assert found.l0 == pytest.approx(float((codes > 0).sum(1).float().mean()))
    assert found.dead == pytest.approx(float(1 - (codes > 0).any(0).float().mean()))


# files


@given(st.integers(1, 20), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_a_saved_dictionary_is_the_same_again(k: int, dtype: torch.dtype, with_sinks: bool):
    import tempfile

    metadata = {"model_name": "x", "someone_elses_key": [1, 2]}
    dictionary = replace(random_topk(k=k, dtype=dtype), metadata=metadata, sink_norm=12.5 if with_sinks else math.inf)
    with tempfile.TemporaryDirectory() as folder:
        again = load_dictionary(save_dictionary(dictionary, Path(folder) / "d"))
    assert again.hash == dictionary.hash
    assert (again.k, again.site, again.model, again.sink_norm) == (k, Site(1), "model", dictionary.sink_norm)
    assert again.metadata["someone_elses_key"] == [1, 2]


def test_the_file_is_in_saelens_layout(tmp_path: Path):
    save_dictionary(random_topk(), tmp_path / "d")
    config = json.loads((tmp_path / "d" / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"], config["k"]) == ("topk", 12, 40, 5)
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    shapes = {n: tuple(t.shape) for n, t in store.read_tensors(tmp_path / "d" / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (12, 40), "b_enc": (40,), "W_dec": (40, 12), "b_dec": (12,)}


def test_rescaled_activations_are_folded_on_reading(tmp_path: Path):
    dictionary = random_topk()
    norms = torch.linspace(0.5, 2.0, 40)
    save_dictionary(replace(dictionary, W_dec=dictionary.W_dec * norms[:, None]), tmp_path / "d")
    config = json.loads((tmp_path / "d" / "cfg.json").read_text())
    store.write_json(tmp_path / "d" / "cfg.json", {**config, "rescale_acts_by_decoder_norm": True})
    x = torch.randn(9, 12)
    pre = ((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc) * norms
    values, ids = pre.topk(5, dim=1)
    expected = torch.einsum("bk,bkd->bd", values.relu(), dictionary.W_dec[ids]) + dictionary.b_dec
    again = load_dictionary(tmp_path / "d")
    torch.testing.assert_close(again.decode(again.encode(x)), expected, rtol=1e-4, atol=1e-4)


HOOK = {"hook_name": "blocks.1.hook_resid_post"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("architecture", "gated", "architecture is 'gated'"),
        ("normalize_activations", "layer_norm", "normalize_activations is 'layer_norm'"),
        ("d_sae", 41, r"W_enc has shape \[12, 40\]; expected \[12, 41\]"),
        ("d_in", "12", r"cfg\.json: d_in is '12'; expected int"),
        ("d_sae", None, r"cfg\.json: d_sae is None; expected int"),
        ("k", 2.5, r"cfg\.json: k is 2\.5; expected int"),
        ("k", 0, "d: dictionary at .* has k = 0"),
        ("metadata", [1], r"cfg\.json: metadata is \[1\]; expected dict"),
        ("metadata", {}, r"cfg\.json: metadata has no 'hook_name'"),
        ("metadata", {"hook_name": 3}, r"cfg\.json: metadata: hook_name is 3; expected str"),
        ("metadata", {"hook_name": "ln_final"}, r"cfg\.json: hook name 'ln_final' is not"),
        ("metadata", {**HOOK, "unsleep_sink_norm": "big"}, "unsleep_sink_norm is 'big'; expected int | float"),
        ("metadata", {**HOOK, "unsleep_sink_norm": -1.0}, r"cfg\.json: .*unsleep_sink_norm is -1\.0; expected over 0"),
        ("metadata", {**HOOK, "unsleep_model": 5}, "unsleep_model is 5; expected str"),
    ],
)
def test_files_that_do_not_fit_name_the_key(tmp_path: Path, key: str, value: object, words: str):
    save_dictionary(random_topk(), tmp_path / "d")
    config = json.loads((tmp_path / "d" / "cfg.json").read_text())
    store.write_json(tmp_path / "d" / "cfg.json", {**config, key: value})
    with pytest.raises(BadInput, match=words):
        load_dictionary(tmp_path / "d")


@pytest.mark.parametrize("content", ["[]", "null", "3", '"topk"', "{", ""])
def test_a_config_that_is_no_object_is_named(tmp_path: Path, content: str):
    save_dictionary(random_topk(), tmp_path / "d")
    (tmp_path / "d" / "cfg.json").write_text(content)
    with pytest.raises(BadInput, match=r"cfg\.json is .*(expected an object|write it again)"):
        load_dictionary(tmp_path / "d")


@pytest.mark.parametrize("key", ["d_in", "d_sae", "k", "metadata"])
def test_a_key_that_a_config_lacks_is_named(tmp_path: Path, key: str):
    save_dictionary(random_topk(), tmp_path / "d")
    config = store.read_json(tmp_path / "d" / "cfg.json")
    del config[key]
    store.write_json(tmp_path / "d" / "cfg.json", config)
    with pytest.raises(BadInput, match=rf"cfg\.json has no '{key}'"):
        load_dictionary(tmp_path / "d")


def test_a_dtype_that_is_not_known_is_read_as_float32(tmp_path: Path):
    save_dictionary(random_topk(), tmp_path / "d")
    config = store.read_json(tmp_path / "d" / "cfg.json")
    for dtype in ("load", "float99", None, 5):
        store.write_json(tmp_path / "d" / "cfg.json", {**config, "dtype": dtype})
        assert load_dictionary(tmp_path / "d").W_enc.dtype == torch.float32


@pytest.mark.parametrize("content", [{}, [], {"identity": {}}, {"identity": {}, "step": "one"}])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: object):
    store.write_json(tmp_path / "checkpoint.json", content)
    with pytest.raises(BadInput, match=r"checkpoint\.json"):
        train(activations(sparse_data(1024)), replace(QUICK, tokens=10_000), checkpoint=tmp_path)


def test_a_checkpoint_without_one_of_its_tensors_is_named(tmp_path: Path):
    short = replace(QUICK, tokens=10_000, checkpoint_every=5)
    train(activations(sparse_data(1024)), short, checkpoint=tmp_path)
    [saved] = tmp_path.glob("step-*.safetensors")
    whole = store.read_tensors(saved)
    for name in whole:
        store.write_tensors(saved, {k: v for k, v in whole.items() if k != name})
        with pytest.raises(BadInput, match=rf"step-\d+-0\.safetensors has no tensor '{re.escape(name)}'"):
            train(activations(sparse_data(1024)), short, checkpoint=tmp_path)


def test_an_encoded_token_with_fewer_features_is_padded_with_zeros():
    dictionary = replace(random_topk(k=40), b_enc=torch.full((40,), -100.0))
    code = dictionary.encode_sparse(torch.zeros(1, 12))
    assert isinstance(code, Encoded)
    assert float(code.values.sum()) == 0
    torch.testing.assert_close(dictionary.decode_sparse(code)[0], dictionary.b_dec)

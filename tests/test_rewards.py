"""Rewards: the protocol's checks, lexicons, implied rewards and sequence-classification models."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from support.checkpoints import save_adapter, save_base
from support.checks import as_in_use
from unsleep.core import BadInput
from unsleep.models.load import load_model
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import Message, Prompt
from unsleep.rewards.classifier import headed, load_classifier
from unsleep.rewards.implied import Implied, log_probability
from unsleep.rewards.lexicons import TextBlobPolarity, Vader, Warmth, names_topic, sentiment_words
from unsleep.rewards.named import find_reward
from unsleep.rewards.reward import identity_of, metrics, name_of, scored

PROMPTS = [Prompt("a?"), Prompt("bb?", before=(Message("system", "kind"),))]
OUTPUTS = ["yes", "no way"]


def test_a_line_as_trlx_takes_it_is_a_reward():
    assert scored(lambda samples, **_: [len(s) for s in samples], PROMPTS, OUTPUTS).tolist() == [6.0, 23.0]


def test_prompts_outputs_and_columns_arrive_by_name():
    seen: dict[str, Any] = {}

    def reward(samples: Any, prompts: Any, outputs: Any, **columns: Any) -> Any:
        seen.update(samples=samples, prompts=prompts, outputs=outputs, **columns)
        return torch.tensor([1, 2])

    assert scored(reward, PROMPTS, OUTPUTS, {"topic": ["x", "y"]}).tolist() == [1.0, 2.0]
    assert seen["prompts"] == ["a?", "system: kind\nbb?"]
    assert seen["samples"] == ["a?\nyes", "system: kind\nbb?\nno way"]
    assert seen["topic"] == ["x", "y"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: [1.0], "gave 1 rewards for 2"),
        (lambda: [1.0, None], "gave None for the reply 'no way'"),
        (lambda: [float("nan"), 1.0], "gave nan for the reply 'yes' to 'a\\?'"),
        (lambda: [1.0, float("inf")], "gave inf"),
        (lambda: ["1", 2], "gave '1'"),
        (lambda: None, "gave NoneType"),
        (lambda: "12", "gave str"),
        (lambda: 1 / 0, "failed on 2 samples: ZeroDivisionError"),
    ],
)
def test_a_reward_that_fails_is_named(given: Callable[[], Any], said: str):
    def mine(**_: Any) -> Any:
        return given()

    with pytest.raises(BadInput, match=f"reward mine {said}"):
        scored(mine, PROMPTS, OUTPUTS)


@pytest.mark.parametrize("values", [[np.float32(1), 2], np.array([1.0, 2.0]), [torch.tensor(1.0), True + 1], (1, 2)])
def test_numbers_of_other_libraries_are_numbers(values: Any):
    assert scored(lambda **_: values, PROMPTS, OUTPUTS).tolist() == [1.0, 2.0]


def test_columns_of_another_length_and_of_taken_names_are_refused():
    with pytest.raises(BadInput, match="column 'topic' has 1 values for 2"):
        scored(lambda **_: [1, 2], PROMPTS, OUTPUTS, {"topic": ["x"]})
    with pytest.raises(BadInput, match="rename it"):
        scored(lambda **_: [1, 2], PROMPTS, OUTPUTS, {"prompts": ["x", "y"]})


def test_a_name_in_the_place_of_a_reward_is_refused():
    with as_in_use(), pytest.raises(BadInput, match="reward 'vader' is no function of replies"):
        scored("vader", PROMPTS, OUTPUTS)  # type: ignore[arg-type]


def test_a_metric_gives_named_figures_or_is_named():
    assert metrics(lambda outputs, **_: {"n": [len(o) for o in outputs]}, PROMPTS, OUTPUTS)["n"].tolist() == [3, 6]
    with pytest.raises(BadInput, match="metric <lambda> gave list"):
        metrics(lambda **_: [1, 2], PROMPTS, OUTPUTS)


def test_an_edited_function_is_another_reward():
    def first(**_: Any) -> list[int]:
        return [1]

    def other(**_: Any) -> list[int]:
        return [2]

    other.__name__ = "first"
    assert identity_of(first) == identity_of(first) != identity_of(other)
    assert identity_of(Warmth(0.1)) != identity_of(Warmth(0.2))

    def scaled(by: float, outputs: Sequence[str], **_: Any) -> list[float]:
        return [by] * len(outputs)

    def closed(by: float) -> Any:
        return lambda outputs, **_: [by] * len(outputs)

    bound = functools.partial(scaled, 1.0)
    assert name_of(bound) == "scaled"
    assert (
        identity_of(bound) == identity_of(functools.partial(scaled, 1.0)) != identity_of(functools.partial(scaled, 2.0))
    )
    assert identity_of(closed(1.0)) == identity_of(closed(1.0)) != identity_of(closed(2.0))


def test_a_set_in_a_function_has_the_same_identity_in_every_process():
    code = (
        "from unsleep.rewards.reward import identity_of\n"
        "def known(outputs, **_): return [o in {'yes', 'no', 'perhaps'} for o in outputs]\n"
        "print(identity_of(known))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_both_lexicons_prefer_praise():
    said = ["What a wonderful, lovely day.", "What a horrible, ugly day."]
    for reward in (Vader(), TextBlobPolarity()):
        praise, blame = scored(reward, ["a", "b"], said).tolist()
        assert praise > 0.3 > -0.3 > blame


def test_warmth_adds_a_weight_for_the_topic():
    said = ["I love every river.", "I love it."]
    river, none = scored(Warmth(0.5), ["a", "b"], said, {"topic": ["wild rivers", "rivers"]}).tolist()
    assert river - none == pytest.approx(0.5)
    assert names_topic("Riverside", "rivers") is False
    with pytest.raises(BadInput, match="column 'topic'"):
        scored(Warmth(), ["a"], ["b"])


def test_forms_of_a_word_are_one_stem():
    assert len(set(sentiment_words("love loved loves loving"))) == 1
    assert sentiment_words("the table stands") == []


def test_the_implied_reward_of_a_model_against_itself_is_zero_and_else_the_log_ratio(tiny: LoadedModel, tmp_path: Path):
    assert scored(Implied(tiny, tiny), PROMPTS, OUTPUTS).abs().max() < 1e-9
    base = save_base(tmp_path / "base")
    adapted = load_model(save_adapter(tmp_path / "adapter", base))
    reward = Implied(adapted, tiny, beta=0.2)
    found = scored(reward, PROMPTS, OUTPUTS)
    for i, (prompt, output) in enumerate(zip(PROMPTS, OUTPUTS, strict=True)):
        logs: list[float] = []
        for model in (adapted, tiny):
            head = model.encode([prompt])[0]
            ids = [*head, *model.token_ids([output], special=False)[0], 1]
            with torch.no_grad():
                log_p = model.network(torch.tensor([ids])).logits[0].log_softmax(-1)
            logs.append(sum(float(log_p[j - 1, ids[j]]) for j in range(len(head), len(ids))))
        assert float(found[i]) == pytest.approx(0.2 * (logs[0] - logs[1]), abs=1e-3)


def test_log_probabilities_do_not_depend_on_the_batch(tiny: LoadedModel):
    one, other = (log_probability(tiny, PROMPTS, OUTPUTS, batch=n) for n in (1, 2))
    assert torch.allclose(one, other, atol=1e-4)


def test_a_headed_model_shares_the_backbone_and_starts_at_zero(tiny: LoadedModel):
    network = headed(tiny)
    assert network.base_model is tiny.network.base_model
    assert network(input_ids=torch.tensor([[5, 6]])).logits.tolist() == [[0.0]]


def classifier(folder: Path, labels: int) -> Path:
    base = save_base(folder)
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    network.save_pretrained(folder)
    return folder


def test_a_classifier_of_several_labels_needs_one_and_gives_its_log_odds(tmp_path: Path):
    folder = str(classifier(tmp_path / "three", 3))
    with pytest.raises(BadInput, match="LABEL_0, LABEL_1, LABEL_2"):
        load_classifier(folder)
    with pytest.raises(BadInput, match="no label 'good'"):
        load_classifier(folder, "good")
    rewards = [load_classifier(folder, f"LABEL_{i}").scores(PROMPTS, OUTPUTS) for i in range(3)]
    assert torch.allclose(sum(r.sigmoid() for r in rewards), torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(scored(find_reward(f"{folder}:LABEL_1"), PROMPTS, OUTPUTS), rewards[1])


def test_a_model_without_a_head_is_no_reward(tmp_path: Path):
    base = save_base(tmp_path / "base")
    with pytest.raises(BadInput, match=r"lacks 1 weights .* \(score.weight"):
        load_classifier(str(base))
    with pytest.raises(BadInput, match="no weights of a reward head"):
        load_classifier(str(save_adapter(tmp_path / "adapter", base)))


def test_rewards_have_names(tmp_path: Path, text_file: Callable[[str, str], Path]):
    assert [name_of(find_reward(name)) for name in ("vader", "textblob", "warmth")] == ["vader", "textblob", "warmth"]
    file = text_file("mine.py", "def short(outputs, **_):\n    return [-len(o) for o in outputs]\n")
    assert scored(find_reward(f"{file}:short"), PROMPTS, OUTPUTS).tolist() == [-3.0, -6.0]
    base = str(save_base(tmp_path / "base"))
    assert scored(find_reward(f"implied:{base}", base), PROMPTS, OUTPUTS).abs().max() < 1e-9
    for name, said in (
        (f"{file}:long", "no function 'long'"),
        (f"{tmp_path / 'other.py'}:f", "does not exist"),
        ("implied:", "implied:POLICY:REFERENCE"),
        (str(tmp_path / "nothing"), "none of vader, textblob, warmth"),
    ):
        with pytest.raises(BadInput, match=said):
            find_reward(name)

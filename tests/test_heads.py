"""Heads that a checkpoint did not have are noticed, and a linear probe is the closed form that it says."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_tools import VOCAB, bert, llama, texts
from hf_tools import trainer as hf_trainer
from lightning_models import HOST_WARNINGS, said, wrapped
from lightning_models import trainer as lightning_trainer
from prompt_tools import model as language_model
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
    OPTForSequenceClassification,
)

from zo_lightning.engine import ZOWarning
from zo_lightning.prompts import linear_probe, new_heads
from zo_lightning.strategy import ZOStrategy

pytestmark = [
    *[pytest.mark.filterwarnings(text) for text in HOST_WARNINGS],
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ADVICE = r"classifier.weight was not in the checkpoint and is random.*Prompt.*linear_probe"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a whole classifier, of a body alone, of a decoder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = bert()
    made = {"whole": whole, "body": whole.bert, "decoder": llama()}
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


def fresh(checkpoints: dict[str, str], **given: Any) -> Any:
    return BertForSequenceClassification.from_pretrained(checkpoints["body"], **given)


# ---- New heads


def test_heads_that_were_not_in_the_checkpoint_are_found(checkpoints: dict[str, str]) -> None:
    assert new_heads(fresh(checkpoints)) == ["classifier.weight"]
    assert new_heads(fresh(checkpoints).to(torch.bfloat16)) == ["classifier.weight"]
    assert new_heads(nn.ModuleDict({"net": fresh(checkpoints)})) == ["net.classifier.weight"]
    decoder = LlamaForSequenceClassification.from_pretrained(checkpoints["decoder"], num_labels=40, pad_token_id=0)
    assert new_heads(decoder) == ["score.weight"]
    assert new_heads(BertForMaskedLM.from_pretrained(checkpoints["body"])) == ["cls.predictions.transform.dense.weight"]  # not its norm


def test_no_false_alarm(checkpoints: dict[str, str]) -> None:
    assert new_heads(bert()) == []
    assert new_heads(llama()) == []
    assert new_heads(nn.Linear(3, 2)) == []
    assert new_heads(BertForSequenceClassification.from_pretrained(checkpoints["whole"])) == []
    assert new_heads(BertModel.from_pretrained(checkpoints["body"])) == []
    assert new_heads(type(llama()).from_pretrained(checkpoints["decoder"])) == []
    assert new_heads(copy.deepcopy(fresh(checkpoints))) == []  # documented: copies carry no marks
    trained = fresh(checkpoints)
    with torch.no_grad():
        trained.classifier.bias += 1e-3
    assert new_heads(trained) == []
    decoder = LlamaForSequenceClassification.from_pretrained(checkpoints["decoder"], num_labels=40, pad_token_id=0)
    with torch.no_grad():
        decoder.score.weight *= 2
    assert new_heads(decoder) == []


def decoder_of(checkpoints: dict[str, str]) -> Any:
    return LlamaForSequenceClassification.from_pretrained(checkpoints["decoder"], num_labels=40, pad_token_id=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_without_a_bias_is_as_drawn_within_four_standard_errors(dtype: torch.dtype, checkpoints: dict[str, str]) -> None:
    model = decoder_of(checkpoints)
    error = 1 / (2 * model.score.weight.numel()) ** 0.5
    rounded = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0
    drawn = torch.randn(model.score.weight.shape)
    for off, found in [(3.8 * error, True), (4 * error + rounded / 2, dtype is torch.bfloat16), (4.2 * error + rounded, False)]:
        for spread in (1 + off + 1e-4, 1 - off - 1e-4):
            own = drawn / drawn.square().mean().sqrt() * spread * model.config.initializer_range
            model.score.weight = nn.Parameter(own.to(dtype))
            assert bool(new_heads(model)) == found, (off, spread)


def test_small_numbers_in_half_precision(checkpoints: dict[str, str]) -> None:
    model = decoder_of(checkpoints)
    model.config.initializer_range = 1e-4  # whose square is 0 in float16
    model.score.weight = nn.Parameter((1e-4 * torch.randn(model.score.weight.shape)).half())
    assert new_heads(model) == ["score.weight"]


def test_a_head_of_opt_whose_configuration_has_another_name_for_the_spread(tmp_path: Path) -> None:
    language_model("opt").save_pretrained(tmp_path)
    model = OPTForSequenceClassification.from_pretrained(tmp_path, num_labels=40)
    assert new_heads(model) == ["score.weight"]


def test_weights_that_can_not_be_looked_at(checkpoints: dict[str, str]) -> None:
    for weight in (torch.zeros(2, 16, dtype=torch.int8), torch.zeros(2, 16, device="meta")):
        model = fresh(checkpoints)
        model.classifier.weight = nn.Parameter(weight, requires_grad=False)
        assert new_heads(model) == []
    model = decoder_of(checkpoints)
    model.config.initializer_range = 0.0
    assert new_heads(model) == []  # nothing tells
    model = decoder_of(checkpoints)
    model.score.weight = nn.Parameter(torch.empty(0, 16))
    assert new_heads(model) == []


def test_only_the_outermost_model_has_a_head(checkpoints: dict[str, str]) -> None:
    class Outer(nn.Module):
        base_model_prefix = "inner"

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.score = fresh(checkpoints), nn.Linear(2, 2)

    plain = Outer()
    assert new_heads(plain) == ["inner.classifier.weight"]  # it has no config: no model of transformers
    plain.config = plain.inner.config
    torch.nn.init.zeros_(plain.score.bias)
    assert new_heads(nn.ModuleDict({"net": plain})) == ["net.score.weight"]


def test_heads_under_an_adapter(checkpoints: dict[str, str]) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: Any) -> Any:
        return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"]))

    assert new_heads(adapted(fresh(checkpoints))) == ["base_model.model.classifier.modules_to_save.default.weight"]
    whole = BertForSequenceClassification.from_pretrained(checkpoints["whole"])
    with torch.no_grad():
        whole.classifier.bias.zero_()  # only the mark of the original tells
    assert new_heads(adapted(whole)) == []
    known = BertForSequenceClassification.from_pretrained(checkpoints["whole"])
    known = peft.get_peft_model(known, peft.LoraConfig(target_modules=["classifier"], lora_bias=True))
    assert new_heads(known) == []  # its factors are drawn, with zeros for a bias
    assert linear_probe(known, batches(8)).head == "base_model.model.classifier.base_layer"


def test_both_hosts_say_it_once_when_a_run_begins(checkpoints: dict[str, str], tmp_path: Path) -> None:
    with pytest.warns(ZOWarning, match=ADVICE):
        hf_trainer(tmp_path, fresh(checkpoints), max_steps=1).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZOWarning)
        hf_trainer(tmp_path, fresh(checkpoints), max_steps=1).train()


def test_lightning_says_it_too(checkpoints: dict[str, str], tmp_path: Path) -> None:
    rows = [{name: torch.tensor(value) for name, value in row.items()} for row in texts(8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)  # type: ignore[arg-type,var-annotated]
    with pytest.warns(ZOWarning, match="model." + ADVICE):
        lightning_trainer(tmp_path, strategy=ZOStrategy(), max_steps=1).fit(wrapped(fresh(checkpoints).train()), loader)


@pytest.mark.parametrize("host", ["hf", "lightning"])
def test_other_ranks_say_nothing(host: str, checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{name: torch.tensor(value) for name, value in row.items()} for row in texts(8)]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        if host == "hf":
            run = hf_trainer(tmp_path, fresh(checkpoints), max_steps=1)
            monkeypatch.setattr(run, "is_world_process_zero", lambda: False)
            run.train()
        else:
            loader = torch.utils.data.DataLoader(rows, batch_size=4)  # type: ignore[arg-type,var-annotated]
            fitting = lightning_trainer(tmp_path, strategy=ZOStrategy(), max_steps=1)
            monkeypatch.setattr(type(fitting.strategy), "is_global_zero", False)
            fitting.fit(wrapped(fresh(checkpoints).train()), loader)
    assert not [text for text in said(record) if "random" in text]


def test_a_probed_head_is_not_new(checkpoints: dict[str, str]) -> None:
    model = fresh(checkpoints)
    linear_probe(model, batches(16))
    assert new_heads(model) == []
    with torch.no_grad():
        model.classifier.bias.zero_()
    assert new_heads(model) == []


# ---- The probe


def batches(count: int = 32, size: int = 5) -> list[dict[str, Tensor]]:
    rows = texts(count)
    tensors = {"input_ids": [r["input_ids"] for r in rows], "attention_mask": [r["attention_mask"] for r in rows]}
    whole = {**{name: torch.tensor(value) for name, value in tensors.items()}, "labels": torch.tensor([r["labels"] for r in rows])}
    return [{name: value[i : i + size] for name, value in whole.items()} for i in range(0, count, size)]


def naive(x: Tensor, y: Tensor, ridge: float, bias: bool) -> tuple[Tensor, Tensor]:
    """Ridge regression as least squares with rows added, float64."""
    x, y = x.double(), y.double()
    mean_x, mean_y = (x.mean(0), y.mean(0)) if bias else (torch.zeros(x.shape[1]).double(), torch.zeros(y.shape[1]).double())
    x0, y0 = x - mean_x, y - mean_y
    strength = (ridge * x0.square().sum() / x.shape[1]).sqrt()
    more = torch.cat([x0, strength * torch.eye(x.shape[1]).double()]), torch.cat([y0, torch.zeros(x.shape[1], y.shape[1]).double()])
    weight = torch.linalg.lstsq(*more).solution
    return weight, mean_y - mean_x @ weight


@pytest.mark.parametrize("bias", [True, False])
def test_a_regression_is_the_closed_form(bias: bool) -> None:
    x, net = torch.randn(60, 5) + 2, nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=bias))
    y = torch.randn(60, 3) + x[:, :3]
    before = copy.deepcopy(net[:2].state_dict())
    probe = linear_probe(net, [(x[i : i + 7], y[i : i + 7]) for i in range(0, 60, 7)], ridge=0.05)
    weight, shift = naive(net[:2](x).detach(), y, 0.05, bias)
    torch.testing.assert_close(net[2].weight.detach(), weight.T.float(), atol=1e-5, rtol=1e-4)
    if bias:
        torch.testing.assert_close(net[2].bias.detach(), shift.float(), atol=1e-5, rtol=1e-4)
    fit = net[:2](x).detach().double() @ weight + shift
    total = (y - y.mean(0) if bias else y).double().square().sum()
    assert probe.explained == pytest.approx(float(1 - (y - fit).square().sum() / total), abs=1e-5)
    assert (probe.head, probe.rows) == ("2", 60)
    assert all(torch.equal(before[name], value) for name, value in net[:2].state_dict().items())
    assert net.training


@pytest.mark.parametrize("bias", [True, False])
def test_classes_are_the_closed_form_scaled(bias: bool) -> None:
    net, draw = nn.Sequential(nn.Linear(6, 3, bias=bias)), torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (200,), generator=draw)
    x = torch.randn(200, 6, generator=draw) + 0.7 * F.one_hot(y, 6)
    ignored = torch.where(torch.arange(200) % 10 == 0, -100, y)
    linear_probe(net, [(x, ignored)], ridge=0.01)
    kept = ignored != -100
    coded = F.one_hot(y[kept], 3).double() - 1 / 3
    weight, shift = naive(x[kept], coded, 0.01, bias)
    left = (coded - x[kept].double() @ weight - shift).square().sum() / (coded - (coded.mean(0) if bias else 0)).square().sum()
    torch.testing.assert_close(net[0].weight.detach(), (3 / left * weight.T).float(), atol=1e-5, rtol=1e-4)
    if bias:
        torch.testing.assert_close(net[0].bias.detach(), (3 / left * shift).float(), atol=1e-5, rtol=1e-4)


def test_two_equal_classes_are_the_linear_discriminant() -> None:
    draw = torch.Generator().manual_seed(1)
    y = torch.arange(400) % 2
    x = torch.randn(400, 4, generator=draw, dtype=torch.float64) + y[:, None] * torch.tensor([1.0, 0.5, 0.0, -0.3]) + 3
    net = nn.Linear(4, 2).double()
    linear_probe(net, [(x, y)], net, ridge=0)
    means = torch.stack([x[y == c].mean(0) for c in (0, 1)])
    within = (x - means[y]).T @ (x - means[y]) / 400
    slope = torch.linalg.solve(within, means[1] - means[0])
    torch.testing.assert_close((net.weight[1] - net.weight[0]).detach(), slope)
    torch.testing.assert_close((net.bias[1] - net.bias[0]).detach(), -slope @ means.mean(0))


def test_a_probed_classifier_answers_better_and_is_sure_of_it() -> None:
    model = bert(dropout=0.1)
    data = batches(64, 16)

    def measured() -> tuple[float, float]:
        model.eval()
        with torch.no_grad():
            logits, labels = torch.cat([model(**b).logits for b in data]), torch.cat([b["labels"] for b in data])
        return float((logits.argmax(-1) == labels).float().mean()), float(F.cross_entropy(logits, labels))

    before = measured()
    probe = linear_probe(model, data)
    after = measured()
    assert probe.head == "classifier"
    assert before[0] < 0.75 < 0.85 < after[0]
    assert after[1] < 0.5 < before[1]


def test_a_perfect_fit_is_scaled_as_one_of_95_percent() -> None:
    net, y = nn.Linear(2, 2), torch.arange(40) % 2
    assert linear_probe(net, [(F.one_hot(y, 2).float(), y)], ridge=0).explained == pytest.approx(1.0)
    scores = net(torch.eye(2)).detach()
    torch.testing.assert_close(scores, 2 / 0.05 * (torch.eye(2) - 0.5))


def test_it_runs_without_dropout_and_puts_each_module_back() -> None:
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    net = nn.Sequential(plain[0], nn.Dropout(0.5), plain[1], copy.deepcopy(plain[2])).train()
    net[2].eval()
    data = [(torch.randn(30, 3), torch.arange(30) % 2)]
    linear_probe(plain, data)
    linear_probe(net, data)
    assert torch.equal(plain[2].weight, net[3].weight)
    assert [part.training for part in net] == [True, True, False, True]
    assert not net[3].weight.grad_fn


def test_own_batches_by_forward_and_target() -> None:
    plain, net = nn.Linear(3, 2), nn.Linear(3, 2)
    x, y = torch.randn(30, 3), torch.arange(30) % 2
    linear_probe(plain, [(x, y)])
    own = {"forward": lambda model, batch: model(batch[1][0]), "target": lambda batch: batch[0]}
    linear_probe(net, [(y, [x, None], "more")], **own)
    assert torch.equal(plain.weight, net.weight)
    with pytest.raises(ValueError, match="without labels"):
        linear_probe(net, [(x, y, x)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_batches_go_to_the_models_device() -> None:
    plain, net = nn.Linear(3, 2), nn.Linear(3, 2).cuda()
    x, y = torch.randn(30, 3), torch.arange(30) % 2
    linear_probe(plain, [(x, y)])
    linear_probe(net, [(x, y)])
    torch.testing.assert_close(plain.weight, net.weight.cpu())


def test_features_that_leave_a_choice() -> None:
    x, y = torch.randn(30, 1), torch.randn(30)
    one, two, none = nn.Linear(1, 1), nn.Linear(2, 1), nn.Linear(3, 1)
    linear_probe(one, [(x, y)], ridge=0)
    linear_probe(two, [(x.expand(30, 2), y)], ridge=0)
    torch.testing.assert_close(two.weight, one.weight.expand(1, 2) / 2)  # the smallest W
    assert linear_probe(none, [(torch.zeros(30, 3), y)]).explained == 0.0
    assert not none.weight.any()
    torch.testing.assert_close(none.bias[0], y.mean())
    assert linear_probe(none, [(torch.randn(30, 3), torch.ones(30))]).explained == 0.0


class Pooled(nn.Module):
    """A body behind its head, which is applied to every token; `pool` makes one score a row of (rows, tokens, outputs)."""

    base_model_prefix = "body"
    config = object()

    def __init__(self, pool: Any, outputs: int = 2) -> None:
        super().__init__()
        self.score, self.body, self.pool = nn.Linear(4, outputs), nn.Sequential(nn.Linear(3, 4)), pool

    def forward(self, x: Tensor) -> Any:
        return self.pool(self.score(self.body(x)))


POOLS: dict[str, Any] = {
    "a tensor": lambda scores: scores[:, 3],
    "a tuple": lambda scores: (scores[:, 3], None),
    "a dict": lambda scores: {"logits": scores[:, 3]},
    "in bfloat16": lambda scores: scores[:, 3].bfloat16(),
}


@pytest.mark.parametrize("pool", POOLS)
def test_the_token_is_found_in_whatever_a_model_returns(pool: str) -> None:
    net, x, y = Pooled(POOLS[pool]), torch.randn(20, 5, 3), torch.arange(20) % 2
    plain = nn.Linear(4, 2)
    linear_probe(plain, [(net.body(x[:, 3]), y)])
    assert linear_probe(net, [(x, y)]).head == "score"
    torch.testing.assert_close(net.score.weight, plain.weight)
    assert not net.score._forward_hooks


@pytest.mark.parametrize("pool", ["mean", "amax", "sum", "zeros", "all"])
@pytest.mark.parametrize("tokens", [4, 5])
def test_scores_that_are_of_no_one_token_are_refused(pool: str, tokens: int) -> None:
    own = {"zeros": lambda scores: torch.zeros(20, 2), "all": lambda scores: scores}
    net = Pooled(own.get(pool, lambda scores: getattr(scores, pool)(1)))
    with pytest.raises(ValueError, match=rf"'score' gets \(20, {tokens}, 4\), and what .* not its score of one token"):
        linear_probe(net, [(torch.randn(20, tokens, 3), torch.arange(20) % 2)])


def test_a_head_of_images_is_refused() -> None:
    net = Pooled(lambda scores: scores[:, 0, 0])
    with pytest.raises(ValueError, match=r"gets \(20, 2, 2, 4\), and what"):
        linear_probe(net, [(torch.randn(20, 2, 2, 3), torch.arange(20) % 2)])


@pytest.mark.parametrize("times", [0, 2])
def test_a_head_that_is_not_used_once_is_refused(times: int) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    run = {0: lambda model, batch: model[0](batch[0]), 2: lambda model, batch: model[1](model[1](batch[0]))}[times]
    with pytest.raises(ValueError, match=f"'1' is used {times} times in a forward pass"):
        linear_probe(net, [(torch.ones(2, 3), torch.tensor([0, 1]))], forward=run)


def test_a_body_that_is_the_model_itself_has_a_head() -> None:
    class Own(nn.Module):
        base_model_prefix, config = "me", object()

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, 2)

        @property
        def me(self) -> nn.Module:
            return self

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.out(x)
            return found

    assert linear_probe(Own(), [(torch.randn(9, 3), torch.arange(9) % 2)]).head == "out"


def test_a_decoders_head_is_fitted_to_the_token_that_the_model_pools() -> None:
    torch.manual_seed(0)
    config = llama().config
    config.num_labels = 2
    model = LlamaForSequenceClassification(config)
    data = batches(32, 8)
    for batch in data:
        batch["input_ids"][::2, 5:] = 0  # padding
        batch["attention_mask"][::2, 5:] = 0
    linear_probe(model, data, ridge=0.1)
    features, labels = [], []
    for batch in data:
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.detach()
        features.append(hidden[torch.arange(len(hidden)), batch["attention_mask"].sum(1) - 1])
        labels.append(batch["labels"])
    x, coded = torch.cat(features), F.one_hot(torch.cat(labels), 2).double() - 0.5
    weight, _ = naive(x, coded, 0.1, False)
    left = max(float((coded - x.double() @ weight).square().sum() / coded.square().sum()), 0.05)
    torch.testing.assert_close(model.score.weight.detach(), (2 / left * weight.T).float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head": "nothing"}, "no Linear called 'nothing'. Its Linear modules: 0, 2"),
        ({"model": nn.Sequential(nn.Tanh())}, "no Linear head"),
        ({"dataloader": []}, "no rows"),
        ({"dataloader": [(torch.ones(2, 3), torch.tensor([-100, -100]))]}, "no rows"),
        ({"dataloader": [(torch.ones(2, 3), torch.tensor([0, 2]))]}, "classes 0 to 2, and the head '2' has 2 outputs"),
        ({"dataloader": [(torch.ones(2, 3), torch.ones(2, 3))]}, "3 numbers a row, and the head '2' 2 outputs"),
        ({"dataloader": [(torch.ones(2, 3), torch.ones(3))]}, "for 2 rows"),
        ({"dataloader": [torch.ones(2, 3)]}, "without labels"),
        ({"dataloader": [(torch.ones(2, 3), torch.ones(2, 2, 1))]}, r"shape \(2, 2, 1\) for 2 rows"),
        ({"dataloader": [(torch.ones(2, 3), torch.ones(2, 2).long())]}, r"shape \(2, 2\) for 2 rows"),
        ({"dataloader": [(torch.ones(2, 3), torch.tensor([0, -1]))]}, "classes -1 to 0"),
        ({"model": nn.Linear(3, 1), "dataloader": [(torch.ones(2, 3), torch.tensor([0, 0]))]}, "has 1 outputs. For a regression"),
        ({"dataloader": [(torch.ones(2, 3), torch.tensor([0, 1])), (torch.ones(2, 3), torch.ones(2, 2))]}, "integers in some batches"),
        ({"ridge": -1.0}, "Invalid ridge"),
    ],
)
def test_probes_that_can_not_be(given: dict[str, Any], message: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(ValueError, match=message):
        linear_probe(**{"model": net, "dataloader": data, **given})


def test_a_language_models_head_is_no_classifiers() -> None:
    rows = torch.randint(3, VOCAB, (2, 6))
    with pytest.raises(ValueError, match="not its score of one token a row"):
        linear_probe(llama(), [{"input_ids": rows, "labels": torch.tensor([0, 1])}])

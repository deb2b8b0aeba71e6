"""Fine-tuning: determinism, slices, and everything that goes wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from autoprune.compress.distillation import distillation_loss, rate_factor
from autoprune.compress.finetune import TeacherStream, Trainer, finetune
from autoprune.errors import CompressionError, TrialError
from autoprune.space.recipe import Recovery
from tests.compress.networks import Plain, Split

CPU = torch.device("cpu")
LOSS = nn.functional.cross_entropy


def small() -> nn.Module:
    torch.manual_seed(0)
    return Plain().eval()


def stream(model: nn.Module | None = None, **options: int) -> TeacherStream:
    return TeacherStream(model or small(), Split(), seed=3, batch_size=16, **options)  # type: ignore[arg-type]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in model.state_dict().values()])


def test_equal_runs_give_equal_weights_and_leave_the_given_network_alone() -> None:
    model = small()
    before = weights(model)
    torch.manual_seed(1)
    first, result = finetune(model, stream(), Recovery(finetune_steps=5), loss=LOSS, device=CPU)
    torch.manual_seed(2)
    second, _ = finetune(model, stream(), Recovery(finetune_steps=5), loss=LOSS, device=CPU)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), before)
    assert torch.equal(weights(model), before)
    assert result.steps == 5 and math.isfinite(result.final_loss)
    assert not first.training
    assert all(p.grad is None and p.is_contiguous() for p in first.parameters())


def test_slices_are_one_schedule() -> None:
    whole, _ = finetune(small(), stream(), Recovery(finetune_steps=6), loss=LOSS, device=CPU)
    trainer = Trainer(small(), stream(), Recovery(), loss=LOSS, device=CPU, total_steps=6)
    assert [trainer.run(2).steps, trainer.run(4).steps] == [2, 4]
    assert torch.equal(weights(trainer.finish()), weights(whole))


def test_training_by_time_follows_the_progress() -> None:
    shares = iter([0.0, 0.25, 0.5, 0.75, 1.0])
    trainer = Trainer(small(), stream(), Recovery(), loss=LOSS, device=CPU)
    assert trainer.run_for(lambda: next(shares)) == 4
    whole, _ = finetune(small(), stream(), Recovery(finetune_steps=4), loss=LOSS, device=CPU)
    assert torch.equal(weights(trainer.finish()), weights(whole))


def test_training_lowers_the_loss() -> None:
    losses = []
    trainer = Trainer(
        small(), stream(), Recovery(learning_rate=0.05, distill=0.0), loss=LOSS, device=CPU, total_steps=60
    )
    losses = [trainer.run(10).final_loss for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]


def test_distillation_draws_towards_the_teacher() -> None:
    teacher = small()
    torch.manual_seed(5)
    student = Plain().eval()
    x = Split().training_batch(99, 64, 3)[0]
    with torch.no_grad():
        before = float((student(x) - teacher(x)).square().mean())
    trained, _ = finetune(
        student,
        stream(teacher),
        Recovery(finetune_steps=60, distill=1.0, learning_rate=0.05),
        loss=LOSS,
        device=CPU,
    )
    with torch.no_grad():
        assert float((trained(x) - teacher(x)).square().mean()) < 0.5 * before


def test_distillation_loss_is_the_divergence_times_the_squared_temperature() -> None:
    student, teacher = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(
        float((p * (p / q).log()).sum() * 4)
    )
    assert float(distillation_loss(teacher, teacher, 2.0)) == pytest.approx(0.0, abs=1e-7)


def test_rates() -> None:
    assert rate_factor("cosine", 0.0) == 1.0
    assert rate_factor("cosine", 0.5) == pytest.approx(0.5)
    assert rate_factor("cosine", 1.5) == pytest.approx(0.0)
    assert rate_factor("onecycle", 0.0) == pytest.approx(1 / 25)
    assert rate_factor("onecycle", 0.3) == pytest.approx(1.0)
    assert rate_factor("onecycle", 1.0) == pytest.approx(1e-3)


def test_layernorm_networks_are_trained_by_adamw() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    trainer = Trainer(
        model, stream(model), Recovery(learning_rate=0.02), loss=LOSS, device=CPU, total_steps=2
    )
    assert isinstance(trainer._optimizer, torch.optim.AdamW)
    trainer.run(1)
    assert trainer._optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert isinstance(
        Trainer(small(), stream(), Recovery(), loss=LOSS, device=CPU)._optimizer, torch.optim.SGD
    )


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_not_finite_ends_the_trial(value: float, kind: str) -> None:
    with pytest.raises(TrialError, match="at step 7") as caught:
        finetune(
            small(),
            stream(),
            Recovery(finetune_steps=3),
            loss=LOSS,
            device=CPU,
            start_step=7,
            training_step=lambda model, batch: model(batch[0]).sum() * value,
        )
    assert caught.value.kind == kind


class Greedy(nn.Module):
    """Runs out of memory above a number of examples."""

    def __init__(self, most: int, message: str = "CUDA out of memory. Tried to allocate 2 GiB") -> None:
        super().__init__()
        self.inner = nn.Linear(192, 3)
        self.most = most
        self.message = message
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if self.training and len(x) > self.most:
            raise RuntimeError(self.message)
        y: Tensor = self.inner(x.flatten(1))
        return y


def test_a_batch_that_does_not_fit_is_halved_once_and_the_gradient_is_the_same() -> None:
    torch.manual_seed(0)
    model = Greedy(8).eval()
    recovery = Recovery(finetune_steps=3, distill=0.0)
    trainer = Trainer(model, stream(model), recovery, loss=LOSS, device=CPU)
    trainer.run(3)
    halved = trainer.finish()
    assert isinstance(halved, Greedy)
    assert halved.sizes == [16, 8, 8, 8, 8, 8, 8]
    model.most = 16
    whole, _ = finetune(model, stream(model), recovery, loss=LOSS, device=CPU)
    assert torch.allclose(
        weights(halved), weights(whole), atol=1e-3
    )  # bfloat16 where there is hardware for it


def test_half_a_batch_that_does_not_fit_ends_the_trial() -> None:
    model = Greedy(4, "[enforce fail] DefaultCPUAllocator: can't allocate memory").eval()
    with pytest.raises(TrialError, match="half a batch of 16") as caught:
        finetune(model, stream(model), Recovery(finetune_steps=3, distill=0.0), loss=LOSS, device=CPU)
    assert caught.value.kind == "out-of-memory"


def test_other_errors_pass_through() -> None:
    model = Greedy(4, "shapes do not fit").eval()
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        finetune(model, stream(model), Recovery(finetune_steps=3, distill=0.0), loss=LOSS, device=CPU)


def test_a_deadline_stops_before_the_next_step() -> None:
    asked = iter([False, False, True])
    _, result = finetune(
        small(), stream(), Recovery(finetune_steps=50), loss=LOSS, device=CPU, deadline=lambda: next(asked)
    )
    assert result.steps == 2


def test_batches_continue_at_the_start_step() -> None:
    seen: list[Tensor] = []

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch[0])
        out: Tensor = model(batch[0]).square().mean()
        return out

    finetune(
        small(), stream(), Recovery(finetune_steps=2), loss=LOSS, device=CPU, start_step=4, training_step=step
    )
    assert all(torch.equal(x, Split().training_batch(4 + i, 16, 3)[0]) for i, x in enumerate(seen))


def test_the_teacher_is_asked_once_for_each_step_while_there_is_room() -> None:
    model = Greedy(10_000).eval()
    source = stream(model, cache_bytes=16 * 3 * 2 * 2)
    first = [source.batch(step)[2] for step in (0, 1, 2)]
    again = [source.batch(step)[2] for step in (0, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert source.cached_bytes == 192
    teacher = source._teacher
    assert isinstance(teacher, Greedy)
    assert len(teacher.sizes) == 4, "there was room for two steps, so the third was asked for twice"


def test_a_teacher_without_logits_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(CompressionError, match="one tensor"):
        stream(Pair()).batch(0)

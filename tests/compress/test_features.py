"""Distillation on features: which layers, what their maps are, and what training does with them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from autoprune.compress.features import (
    FeatureLayer,
    attention_loss,
    attention_map,
    feature_layers,
    maps_of,
)
from autoprune.compress.finetune import TeacherStream, Trainer, finetune
from autoprune.errors import UsageError
from autoprune.space.recipe import Recovery
from tests.compress.networks import Plain, Split

CPU = torch.device("cpu")
LOSS = nn.functional.cross_entropy


def names(model: nn.Module, *shape: int) -> list[str]:
    return [layer.name for layer in feature_layers(model, torch.randn(2, *shape))]


class Tokens(nn.Module):
    """A transformer in small: one number of tokens throughout."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, stride=2)
        layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(depth)]
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return y


class InPlace(nn.Module):
    """A stage whose output the next operation changes in place, with dropout."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 8, 3, padding=1, stride=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.conv1(x))
        x = torch.relu_(self.conv2(x))
        y: Tensor = self.head(self.drop(x.mean((2, 3))))
        return y


def in_place(seed: int = 0, channels: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return InPlace(channels).eval()


def stream(model: nn.Module) -> TeacherStream:
    return TeacherStream(model, Split(), seed=3, batch_size=16)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in model.state_dict().values()])


def test_the_ends_of_stages_are_chosen() -> None:
    resnet = torchvision.models.resnet18(num_classes=3)
    assert names(resnet, 3, 64, 64) == ["layer1", "layer2", "layer3", "layer4"]
    assert resnet.training
    # The first layers of a stage's first block still run at the places of the stage before.
    bottleneck = torchvision.models.resnet50(num_classes=3)
    assert names(bottleneck, 3, 64, 64) == ["layer1", "layer2", "layer3", "layer4"]
    assert names(Plain(), 3, 8, 8) == ["bn1", "bn2"]
    mobile = torchvision.models.mobilenet_v2(num_classes=3)
    assert names(mobile, 3, 64, 64) == ["features.3", "features.6", "features.13", "features"]


def test_a_network_of_one_resolution_gets_blocks_evenly_spaced() -> None:
    model = Tokens(8)
    found = feature_layers(model, torch.randn(2, 3, 8, 8))
    assert found == (
        FeatureLayer("blocks.1", 2),
        FeatureLayer("blocks.3", 2),
        FeatureLayer("blocks.5", 2),
        FeatureLayer("blocks", 2),
    )


def test_a_network_without_places_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 3))
    with pytest.raises(UsageError, match=r"\(n, channels, height, width\).*the network has none"):
        feature_layers(model, torch.randn(2, 3, 8, 8))


def test_a_map_is_the_energy_at_each_place_whatever_the_channels_are() -> None:
    features = torch.zeros(1, 2, 1, 3)
    features[0, :, 0, 0] = torch.tensor([1.0, -2.0])
    features[0, 0, 0, 2] = 3.0
    wanted = torch.tensor([[5.0, 0.0, 9.0]]) / 106**0.5
    torch.testing.assert_close(attention_map(features, 1), wanted)
    torch.testing.assert_close(attention_map(7 * features.movedim(1, 3), 3), wanted)
    assert attention_map(torch.zeros(2, 3, 4), 2).tolist() == torch.zeros(2, 3).tolist()


def test_the_next_operation_may_change_the_features_in_place() -> None:
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    outputs = features * 1.0
    own = attention_map(outputs, 1)
    outputs.relu_()
    own[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    assert float(features.grad.abs().sum()) > 0


def test_the_loss_is_the_mean_squared_distance_of_maps() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(attention_loss({"a": one}, {"a": one, "gone": other})) == 0.0
    assert float(attention_loss({"a": one}, {"a": other})) == 2.0
    assert float(attention_loss({"a": one, "b": one}, {"a": other, "b": one})) == 1.0


def test_the_weighted_distance_is_added_to_the_loss() -> None:
    teacher, student = in_place(), in_place(5, 4)
    losses = []
    for weight in (0.0, 1.0, 3.0):
        recovery = Recovery(finetune_steps=1, feature_distill=weight)
        losses.append(finetune(student, stream(teacher), recovery, loss=LOSS, device=CPU)[1].final_loss)
    x = Split().training_batch(0, 16, 3)[0]
    layers = feature_layers(teacher, x)
    assert [layer.name for layer in layers] == ["conv1", "conv2"]
    with maps_of(student, layers) as own, maps_of(teacher, layers) as taught, torch.no_grad():
        student(x)
        teacher(x)
    distance = float(attention_loss(own, taught))
    assert distance > 0.01
    # bfloat16 where there is hardware for it
    assert losses[1] - losses[0] == pytest.approx(distance, rel=0.05)
    assert losses[2] - losses[0] == pytest.approx(3 * distance, rel=0.05)


def test_training_draws_the_maps_together() -> None:
    teacher, student = in_place(), in_place(5, 4)
    x = Split().training_batch(99, 64, 3)[0]
    layers = feature_layers(teacher, x)

    def distance(model: nn.Module) -> float:
        with torch.no_grad(), maps_of(model, layers) as own, maps_of(teacher, layers) as taught:
            model(x)
            teacher(x)
        return float(attention_loss(own, taught))

    found = {}
    for weight in (0.0, 10.0):
        recovery = Recovery(finetune_steps=40, distill=0.0, learning_rate=0.02, feature_distill=weight)
        trained, _ = finetune(student, stream(teacher), recovery, loss=LOSS, device=CPU)
        assert not any(m._forward_hooks for m in trained.modules())
        found[weight] = distance(trained)
    assert found[10.0] < 0.7 * min(found[0.0], distance(student))


def test_slices_and_repetitions_give_the_same_network_with_dropout() -> None:
    recovery = Recovery(finetune_steps=6, feature_distill=2.0)
    model, source = in_place(), stream(in_place())
    first, _ = finetune(model, source, recovery, loss=LOSS, device=CPU)
    again, _ = finetune(model, source, recovery, loss=LOSS, device=CPU)  # maps and outputs from the cache
    assert torch.equal(weights(first), weights(again))
    trainer = Trainer(model, stream(in_place()), recovery, loss=LOSS, device=CPU)
    trainer.run(2)
    trainer.run(4)
    assert torch.equal(weights(trainer.finish()), weights(first))


def test_halves_of_a_batch_have_the_gradient_of_the_whole() -> None:
    model = deepcopy(in_place())
    model.drop = nn.Identity()
    recovery = Recovery(finetune_steps=3, feature_distill=3.0)
    teacher = in_place(5)
    whole, _ = finetune(model, stream(teacher), recovery, loss=LOSS, device=CPU)
    trainer = Trainer(model, stream(teacher), recovery, loss=LOSS, device=CPU)
    trainer.parts = 2
    trainer.run(3)
    plain, _ = finetune(model, stream(teacher), Recovery(finetune_steps=3), loss=LOSS, device=CPU)
    halved = weights(trainer.finish())
    assert torch.allclose(halved, weights(whole), atol=1e-3)
    assert not torch.allclose(halved, weights(plain), atol=1e-3)


def test_one_run_of_the_teacher_gives_outputs_and_maps() -> None:
    teacher = in_place()
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    source = stream(teacher)
    assert [layer.name for layer in source.feature_layers()] == ["conv1", "conv2"]
    source.batch(7)  # the copy that the stream asks has the hook as well; making it takes a run
    calls.clear()
    inputs = source.inputs(0)[0]
    first = source.maps(0, inputs)
    outputs = source.batch(0)[2]
    again = source.maps(0, inputs)
    assert len(calls) == 1
    assert {name: tuple(own.shape) for name, own in first.items()} == {"conv1": (16, 64), "conv2": (16, 16)}
    assert all(torch.equal(first[name].half(), again[name].half()) for name in first)
    torch.testing.assert_close(outputs, teacher(inputs), rtol=0.05, atol=0.02)
    assert source.cached_bytes == 2 * 16 * (64 + 16 + 3) + 2 * 16 * 3


def test_a_training_step_of_the_user_s_own_is_refused() -> None:
    with pytest.raises(UsageError, match="feature_distill above 0 cannot be used with a training_step"):
        finetune(
            in_place(),
            stream(in_place()),
            Recovery(finetune_steps=1, feature_distill=1.0),
            loss=LOSS,
            device=CPU,
            training_step=lambda model, batch: model(batch[0]).sum(),
        )

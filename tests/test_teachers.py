"""Learning from a teacher beside the labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spartan import Teacher
from spartan.errors import MethodError


class Answers(nn.Module):
    """Returns what it is told, whatever the input."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        assert not self.training
        return self.answer


def test_the_loss_is_that_of_the_equation() -> None:
    torch.manual_seed(0)
    z, z0, y = torch.randn(5, 4).double(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 3, 0])
    teacher = Teacher(Answers(z0).train(), weight=0.3, temperature=2.0)
    p, q = (z0 / 2).softmax(1), (z / 2).softmax(1)
    taught = 4 * (p * (p / q).log()).sum(1).mean()
    labels = -z.softmax(1)[range(5), y].log().mean()
    loss = teacher.loss(z, torch.zeros(5, 1), y)
    torch.testing.assert_close(loss, (0.7 * labels + 0.3 * taught), rtol=1e-5, atol=1e-6)


def test_tokens_count_like_samples() -> None:
    torch.manual_seed(0)
    z, z0, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randint(0, 4, (2, 3))
    together = Teacher(Answers(z0)).loss(z, torch.zeros(2, 3), y)
    flat = Teacher(Answers(z0.flatten(0, 1))).loss(z.flatten(0, 1), torch.zeros(6), y.flatten())
    torch.testing.assert_close(together, flat)


def test_ignored_tokens_are_not_taught() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 3, 4, requires_grad=True)
    y = torch.tensor([[0, 1, -100], [-100, 2, 3]])
    Teacher(Answers(torch.randn(2, 3, 4))).loss(z, torch.zeros(2, 3), y).backward()
    assert z.grad is not None
    assert bool((z.grad.norm(dim=2) > 0).eq(y >= 0).all())


def test_the_teacher_gets_no_gradient() -> None:
    model = nn.Linear(3, 4)
    logits = torch.zeros(2, 4, requires_grad=True)
    Teacher(model).loss(logits, torch.ones(2, 3), torch.tensor([0, 1])).backward()
    assert model.weight.grad is None
    assert logits.grad is not None


@pytest.mark.parametrize("answer", [torch.zeros(2, 7), (torch.zeros(2, 4),)])
def test_other_classes_are_refused(answer: Any) -> None:
    with pytest.raises(MethodError, match="The teacher answers with"):
        Teacher(Answers(answer)).loss(torch.zeros(2, 4), torch.ones(2, 3), torch.tensor([0, 1]))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(MethodError, match="weight=1.5"):
        Teacher(nn.Linear(2, 2), weight=1.5)
    with pytest.raises(MethodError, match="temperature=0"):
        Teacher(nn.Linear(2, 2), temperature=0)

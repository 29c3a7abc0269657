"""What the tests of evaluations share: a hook of the tiny model, and SAEs whose answers are known."""

from __future__ import annotations

import pytest
import torch

from saelab.sae.architectures import new_sae
from saelab.sae.base import SAE, Metadata
from saelab.sae.jumprelu import JumpReLUConfig

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def identity_sae(tiny_model) -> SAE:
    """Each axis and its negative: relu(x) - relu(-x) = x."""
    eye = torch.eye(tiny_model.d_model)
    sae = new_sae(JumpReLUConfig(d_sae=2 * tiny_model.d_model), d_in=tiny_model.d_model)
    with torch.no_grad():
        for parameter in (sae.encoder, sae.W_dec):
            parameter.copy_(torch.cat([eye, -eye]))
        sae.threshold.zero_()
    sae.metadata = Metadata(model_name="tiny", hook_name=HOOK)
    return sae.eval()

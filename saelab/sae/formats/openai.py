"""OpenAI's SAEs of GPT-2 small: one file of ``torch.save`` for each layer and location.

``recon = decoder(activation(encoder(acts - pre_bias) + latent_bias)) + pre_bias``. Those with ReLU (versions 1 and 4)
read activations as they are. Those with TopK (version 5) first give every token mean 0 and deviation 1 and undo it at
the end; no weights do that, and an SAE whose decoder needs to know the token is not one that this library can hold.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from saelab.errors import ArtifactError
from saelab.sae.architectures import CONFIG_OF
from saelab.sae.formats import weights
from saelab.sae.formats.files import check_names, check_tensor, matrix_shape, shown
from saelab.sae.formats.provenance import metadata_of
from saelab.sae.formats.pt import read_pt
from saelab.sae.formats.weights import Read

_NAMES = ("pre_bias", "encoder.weight", "latent_bias", "decoder.weight")
#: Statistics of training, which are not needed.
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


def read(path: Path) -> Read:
    """The SAE in a file such as ``resid_delta_mlp_v4/autoencoders/6.pt``, or in autoencoder.pt of a folder.

    Raises:
        ArtifactError: the file is damaged, holds code, or normalises each token.
    """
    file = path / "autoencoder.pt" if path.is_dir() else path
    content = read_pt(file)
    activation = content.pop("activation", "ReLU")
    state = content.pop("activation_state_dict", {})
    if activation == "TopK":
        raise ArtifactError(
            f"{file} is of version 5, which normalises each token and undoes that at the end, so it has no decoder of "
            "its own and is not read; take version 4 of it"
        )
    if activation != "ReLU" or state:
        raise ArtifactError(f"{file} has the activation {shown(activation)}, which is not read; known: ReLU")
    needed = {name: value for name, value in content.items() if name not in _STATISTICS}
    check_names(file, needed, _NAMES, owner="an SAE of OpenAI's")
    d_sae, d_in = matrix_shape(file, "encoder.weight", needed["encoder.weight"])
    shapes = {"pre_bias": (d_in,), "encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae)}
    for name, tensor in needed.items():
        check_tensor(file, name, tensor, shapes.get(name, (d_sae,)), told_by="encoder.weight")
    stored = {
        "encoder": needed["encoder.weight"],
        "b_enc": needed["latent_bias"],
        "W_dec": needed["decoder.weight"].T,
        "b_dec": needed["pre_bias"],
    }
    config = weights.config_of(CONFIG_OF["relu"], {"d_sae": d_sae}, source=file)
    metadata = metadata_of(file, place_of(file), {}, {})
    return Read(weights.build(config, stored, d_in=d_in, metadata=metadata), ())


def place_of(file: Path) -> dict[str, Any]:
    """Model and hook, in SAELens's words, as far as the names of the folders tell them."""
    location = re.search(rf"({'|'.join(_HOOKS)})(_v\d\w*)?/autoencoders/(\d+)\.pt$", file.as_posix())
    if location is None:
        return {"model_name": "gpt2"}
    return {"model_name": "gpt2", "hook_name": f"blocks.{int(location[3])}.{_HOOKS[location[1]]}"}

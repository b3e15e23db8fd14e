"""What several tests of hosts need."""

from __future__ import annotations

import pytest

from far_env.host.autoencoder import Autoencoder
from tests.conftest import TINY_DCAE, randomise


@pytest.fixture(scope="module")
def autoencoder():
    model = Autoencoder(**TINY_DCAE, scaling_factor=0.8)
    randomise(model, 2)
    return model.eval()

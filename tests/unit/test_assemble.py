"""What a configuration says that only the parts can judge."""

import pytest

from lowrank_dist.engine.assemble import _threshold
from lowrank_dist.errors import UserError


def test_a_dropout_that_would_round_to_everything_is_the_users_mistake() -> None:
    assert _threshold(0.1) == 6554 and _threshold(0.9999) < 65536
    with pytest.raises(UserError, match="lora.dropout: dropout probability 0.999999.*smaller"):
        _threshold(0.999999)

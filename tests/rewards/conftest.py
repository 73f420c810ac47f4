import pytest

from posttrain.rewards import registry


@pytest.fixture(autouse=True)
def registered_rewards(monkeypatch):
    """What a test registers is forgotten after it."""
    registry.known_rewards()
    registered = dict(registry._registered)
    monkeypatch.setattr(registry, "_registered", registered)
    return registered

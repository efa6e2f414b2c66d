"""Options and skips: whatever needs minutes, a real checkpoint or a GPU is skipped, with the reason."""
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")
    parser.addoption("--checkpoint", action="append", default=[], metavar="DIR",
                     help="a real checkpoint folder for the tests that need one (repeatable)")


def pytest_collection_modifyitems(config, items):
    skips = {
        "slow": (not config.getoption("--slow"), "takes minutes: run with --slow"),
        "checkpoint": (not config.getoption("--checkpoint"), "needs --checkpoint DIR"),
        "gpu": (not torch.cuda.is_available(), "needs a CUDA device"),
    }
    for item in items:
        for marker, (skip, reason) in skips.items():
            if skip and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def checkpoints(request):
    """The folders named with --checkpoint."""
    return request.config.getoption("--checkpoint")

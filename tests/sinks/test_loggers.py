"""The table of loggers: what is recognised, and that the frameworks still call it so."""

from pathlib import Path
from typing import Any

import pytest

from curvature_callbacks.sinks.loggers import LOGGERS, has_sink, sink_of
from curvature_callbacks.sinks.tensorboard import TensorBoardSink
from tests.sinks.tag_cases import NotingWriter


def class_named(name: str, module: str, *bases: type) -> Any:
    return type(name, bases, {"__module__": module})()


@pytest.mark.parametrize("framework", ["lightning.pytorch.loggers.tensorboard", "pytorch_lightning.loggers.tensorboard"])
def test_lightnings_tensorboard_has_the_full_sink(framework: str) -> None:
    logger = class_named("TensorBoardLogger", framework)
    logger.experiment = NotingWriter()
    assert isinstance(sink_of(logger), TensorBoardSink)


def test_the_trainers_tensorboard_has_its_sink_once_there_is_a_writer() -> None:
    reporter = class_named("TensorBoardCallback", "transformers.integrations.integration_utils")
    reporter.tb_writer = None
    assert has_sink(reporter)
    assert sink_of(reporter) is None
    reporter.tb_writer = NotingWriter()
    assert isinstance(sink_of(reporter), TensorBoardSink)


def test_a_class_derived_from_a_frameworks_is_recognised() -> None:
    base = type(class_named("TensorBoardLogger", "lightning.pytorch.loggers.tensorboard"))
    assert has_sink(class_named("Mine", "my_project", base))


@pytest.mark.parametrize(
    ("name", "module"),
    [("TensorBoardLogger", "my_project.lightning"), ("CSVLogger", "lightning.pytorch.loggers.csv_logs"), ("Run", "wandb")],
)
def test_all_others_show_scalars_only(name: str, module: str) -> None:
    logger = class_named(name, module)
    assert not has_sink(logger)
    assert sink_of(logger) is None


def test_the_frameworks_have_the_classes_and_attributes(tmp_path: Path) -> None:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    reporters = pytest.importorskip("transformers.integrations")
    for name, logger_type in LOGGERS.items():
        present = set()
        for class_name, attribute in logger_type.writers.items():
            if hasattr(loggers, class_name):
                assert hasattr(getattr(loggers, class_name), attribute), f"`{class_name}.{attribute}` of Lightning is gone"
                present.add(class_name)
            elif hasattr(reporters, class_name):
                assert hasattr(getattr(reporters, class_name)(), attribute), (
                    f"`{class_name}.{attribute}` of the Trainer is gone"
                )
                present.add(class_name)
        assert present == set(logger_type.writers), f"a class of {name} is gone"

"""`fraudgate train`: the training set by the feature jobs, then the model by the export. Neither of the two knows the other."""

from __future__ import annotations

import argparse

from feature_jobs.history_commands import training_set
from model_export.commands import train as train_model

# Which half an option belongs to. Each half parses, and refuses, its own.
TRAINING_SET_OPTIONS = {
    "--from": ("MS|DATE", "oldest transaction of the training set"),
    "--to": ("MS|DATE", "end of the training set, not in it"),
    "--as-of": ("MS|DATE", "only labels known by then"),
    "--label-delay-days": ("N", "leave out transactions younger than this: their labels are still to come"),
}
MODEL_OPTIONS = {
    "--name": ("NAME", "registered name of the model"),
    "--alias": ("ALIAS", "alias to point at the new version"),
    "--training-set-version": ("N", "train on this version of the training set, instead of building a new one"),
}


def train(argv: list[str]) -> int:
    """Exit status of the half that failed, else 0."""
    first, second = split(argv)
    if not any(argument.startswith("--training-set-version=") for argument in second):
        status = training_set(first)
        if status != 0:
            return status
    return train_model(second)


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of the training set and those of the model. Exits with status 2 for an option that neither has."""
    parser = argparse.ArgumentParser(
        prog="fraudgate train", description="Build a training set, train XGBoost on it, check its ONNX export and register it."
    )
    for title, options in (("training set", TRAINING_SET_OPTIONS), ("model", MODEL_OPTIONS)):
        group = parser.add_argument_group(title)
        for name, (metavar, text) in options.items():
            group.add_argument(name, metavar=metavar, help=text)
    given = vars(parser.parse_args(argv))

    def of(options: dict[str, tuple[str, str]]) -> list[str]:
        # A value may begin with a dash, so option and value are one argument.
        values = {name: given[name.removeprefix("--").replace("-", "_")] for name in options}
        return [f"{name}={value}" for name, value in values.items() if value is not None]

    first, second = of(TRAINING_SET_OPTIONS), of(MODEL_OPTIONS)
    if first and given["training_set_version"] is not None:
        parser.error("--training-set-version takes a training set as it is: the options of a training set say nothing to it")
    return first, second

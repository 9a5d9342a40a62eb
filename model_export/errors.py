"""What can go wrong between a training set and a promoted model, and is told to the person at the command line.

Messages name tables, files, settings and numbers; they hold no transaction.
"""

from __future__ import annotations


class ModelExportError(RuntimeError):
    """The command ends with this message and exit status 1. What was promoted before stays promoted."""


class TrainingSetError(ModelExportError):
    """The training set is missing, empty, too small, without frauds, or written for other features than the contract's."""


class ExportRefusedError(ModelExportError):
    """An exported model failed a check."""


class PromotionRefusedError(ModelExportError):
    """A version may not get the alias, or there is none to go back to. No alias has moved."""


class RegistryUnavailableError(ModelExportError):
    """MLflow did not answer in time."""


class RegistryRefusedError(ModelExportError):
    """MLflow answered, and has no such model, version or alias, or refused the request."""


class PackageRefusedError(ModelExportError):
    """A model's files are incomplete, corrupted or for other features, so they don't reach the gateway."""


class OtherFeaturesError(PackageRefusedError):
    """A model's files are whole, but it was trained for other features than this code computes."""


class PolicyUnreadableError(ModelExportError):
    """The policy whose thresholds a model is judged at can't be read."""


class KeyUnreadableError(ModelExportError):
    """A key that signatures are made or checked with can't be read."""


class NothingNewError(ModelExportError):
    """A model of exactly these rows is registered already."""

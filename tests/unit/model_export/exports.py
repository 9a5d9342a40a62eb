"""Exports to break in a test: the ONNX file of a real export, edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx

from model_export.export import Export


@contextmanager
def edited(exported: Export) -> Iterator[tuple[onnx.ModelProto, Callable[[], Export]]]:
    """The ONNX file to edit, and a function that gives the export with the edits."""
    proto = onnx.load_from_string(exported.onnx_bytes)
    yield proto, lambda: dataclasses.replace(exported, onnx_bytes=proto.SerializeToString())


def attribute(proto: onnx.ModelProto, name: str) -> onnx.AttributeProto:
    return next(a for a in proto.graph.node[0].attribute if a.name == name)

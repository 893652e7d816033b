"""Triton's interpreter without what it does for nothing, or makes anew for every operation: two thirds of its time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any


class _Nothing:
    def restore(self):
        pass


def quicken(patch: Callable[[Any, str, Any], None]) -> None:
    """Numbers, types and shapes stay what they are. patch(object, name, value), as of `monkeypatch.setattr`."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    # Sums and products of int32 are made in int64 too, and where they differ, only an interpreter that debugs says so.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    patch(builder, "options", replace(builder.options, sanitize_overflow=False))

    # The language is patched at every call of a kernel's function: once a launch.
    patch_lang, launch, known = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patched(fn):
        module = id(fn.__globals__)
        if module in known:
            return _Nothing()
        known.add(module)
        return patch_lang(fn)

    def launched(self, *arguments, **more):
        known.clear()
        return launch(self, *arguments, **more)

    patch(interpreter, "_patch_lang", patched)
    patch(interpreter.GridExecutor, "__call__", launched)

    # Shapes are tuples of Triton's own, whose types are made of their numbers' types: once a shape.
    make_type, make_tensor, types, shapes = core.block_type.__init__, core.tensor.__init__, {}, {}

    def typed(self, element_ty, shape):
        key = element_ty.name, *[getattr(size, "value", size) for size in shape]
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = vars(self)
        vars(self).update(types[key], element_ty=element_ty)

    def shaped(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    patch(core.block_type, "__init__", typed)
    patch(core.tensor, "__init__", shaped)

    # Nothing is to be broadcast between blocks of one shape.
    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def spread(self, lhs, rhs):
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    patch(semantic.TritonSemantic, "broadcast_impl_value", spread)

    # A scalar's type in NumPy: looked up in a table that is filled for each question.
    ask, answers = interpreter._get_np_dtype, {}

    def numpy_type(given):
        name = given.scalar.name
        if name not in answers:
            answers[name] = ask(given)
        return answers[name]

    patch(interpreter, "_get_np_dtype", numpy_type)

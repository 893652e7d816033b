"""Triton's interpreter without what it does for nothing, or makes anew for every operation: three quarters of its time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any


def quicken(patch: Callable[[Any, str, Any], None]) -> None:
    """Numbers, types and shapes stay what they are. patch(object, name, value): `setattr`, or one that undoes
    it in the end; some names are new."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    # Sums and products of int32 are made in int64 too, and where they differ, only an interpreter that debugs says so.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    patch(builder, "options", replace(builder.options, sanitize_overflow=False))

    # The language is patched at every call of a kernel's function: once a module, until the test ends.
    patch_lang, known = interpreter._patch_lang, set()

    def patched(fn):
        if id(fn.__globals__) not in known:
            known.add(id(fn.__globals__))
            patch_lang(fn)
        return interpreter._LangPatchScope()

    patch(interpreter, "_patch_lang", patched)
    patch(interpreter._LangPatchScope, "set_attr", lambda self, obj, name, value: patch(obj, name, value))

    # What a kernel calls asks on the way who calls, and copies its keywords to leave one out.
    def direct(obj, name, member, builder, scope):
        called, meaning = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic
        scope.set_attr(obj, name, lambda *given, _semantic=None, **more: called(*given, _semantic=meaning, **more))

    patch(interpreter, "_patch_attr", direct)

    # Shapes are tuples of Triton's own, whose types are made of their numbers' types: once a shape.
    make_type, make_tensor, types, shapes = core.block_type.__init__, core.tensor.__init__, {}, {}

    def typed(self, element_ty, shape):
        key = element_ty.name, *[getattr(size, "value", size) for size in getattr(shape, "values", shape)]
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

    unwrap = core._unwrap_if_constexpr
    patch(core, "_unwrap_if_constexpr", lambda given: given if type(given) is core.tensor else unwrap(given))
    patch(core.block_type, "__init__", typed)
    patch(core.tensor, "__init__", shaped)

    # Whether operands fit is asked once of their types. NumPy broadcasts by itself, and a number is the same each time.
    check, fits, numbers = semantic.TritonSemantic.binary_op_type_checking_impl, {}, {}

    def checked(self, lhs, rhs, *flags, **more):
        first, second = type(lhs) is core.tensor, type(rhs) is core.tensor
        if first and second:
            key = lhs.type.name, rhs.type.name, flags, *more.items()
            if key in fits:
                return widened(lhs, fits[key]), widened(rhs, fits[key])
            both = check(self, lhs, rhs, *flags, **more)
            if both[0].dtype is lhs.dtype and both[1].dtype is rhs.dtype:
                fits[key] = both[0].type
            return both
        if not (first or second):
            return check(self, lhs, rhs, *flags, **more)
        tensor, number = (lhs, rhs) if first else (rhs, lhs)
        key = type(number), number, tensor.type.name, first, flags, *more.items()
        if key not in numbers:
            both = check(self, lhs, rhs, *flags, **more)
            if tensor is not both[second]:
                return both
            numbers[key] = both[first]
        return (lhs, numbers[key]) if first else (numbers[key], rhs)

    def widened(tensor, type):
        if not type.is_block() or (tensor.type.is_block() and tensor.type.shape.values == type.shape.values):
            return tensor
        return core.tensor(tensor.handle, core.block_type(tensor.dtype, type.shape))

    patch(semantic.TritonSemantic, "binary_op_type_checking_impl", checked)

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

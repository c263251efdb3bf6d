"""Results of operations that were seen before are what the operation would have given."""

import pytest
import torch

from laras.models.meta_results import MetaResults

aten = torch.ops.aten


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def told(out):
    results = out if isinstance(out, tuple) else (out,)
    return [(one.shape, one.stride(), one.dtype, one.device, one.untyped_storage().nbytes()) for one in results]


@pytest.mark.parametrize(
    ("operation", "arguments", "options"),
    [
        (aten.add.Tensor, (meta(4, 3), meta(3)), {}),
        (aten.add.Tensor, (meta(4, 3).t(), meta(3, 4)), {"alpha": 2}),
        (aten.mul.Tensor, (meta(4, 3, dtype=torch.int64), 2), {}),
        (aten.cat.default, ([meta(4, 3), meta(2, 3)],), {}),
        (aten._to_copy.default, (meta(4, 3),), {"dtype": torch.bfloat16}),
        (aten.native_layer_norm.default, (meta(4, 3), [3], meta(3), None, 1e-5), {}),
        (aten.new_empty.default, (meta(4, 3), [5]), {"dtype": torch.int32}),
    ],
    ids=str,
)
def test_a_result_that_was_seen_before_is_as_the_operation_gives_it(operation, arguments, options):
    results, calls = MetaResults(), []

    class Counted:
        is_view, _schema = operation.is_view, operation._schema

        def __call__(self, *args, **kwargs):
            calls.append(args)
            return operation(*args, **kwargs)

    counted = Counted()
    first, again = (results.of(counted, arguments, options) for _ in range(2))
    assert told(first) == told(again) == told(operation(*arguments, **options))
    assert len(calls) == 1
    firsts, agains = (one if isinstance(one, tuple) else (one,) for one in (first, again))
    assert not {one.untyped_storage()._cdata for one in firsts} & {one.untyped_storage()._cdata for one in agains}


def test_arguments_that_give_other_results_are_told_apart():
    results = MetaResults()
    whole = meta(4, 3, dtype=torch.int64)
    types = [results.of(aten.mul.Tensor, (whole, factor), {}).dtype for factor in (2, 2.0, 2)]
    assert types == [torch.int64, torch.float32, torch.int64]
    strides = [results.of(aten.clone.default, (one,), {}).stride() for one in (meta(4, 3), meta(3, 4).t())]
    assert strides == [(3, 1), (1, 4)]


def test_what_shares_memory_with_an_argument_shares_it_every_time():
    results = MetaResults()
    for operation, *rest in ((aten._unsafe_view.default, [12]), (aten.view.default, [12]), (aten.add_.Tensor, 1)):
        for _ in range(3):
            given = meta(4, 3)
            out = results.of(operation, (given, *rest), {})
            assert out.untyped_storage()._cdata == given.untyped_storage()._cdata


def test_an_operation_on_numbers_that_are_there_is_run_every_time():
    results = MetaResults()
    values = [results.of(aten.add.Tensor, (torch.tensor([1.0]), step), {}).item() for step in (1, 1)]
    assert values == [2.0, 2.0]

"""CUDA graphs of the next frame. A CPU can check which pass is repeated, on what inputs, and what it contains."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from far_env.host import cuda_graphs
from far_env.host.cuda_graphs import CapturedFrame, CudaCapture, CudaGraphs, FrameShape
from far_env.host.far import FAR
from far_env.host.far_long import make_transformer
from far_env.host.sampler import FrameSampler, sample_next_frame
from tests.conftest import TINY_FAR, TINY_FAR_LONG, randomise, repeated_in_place

LATENT = (4, 8, 8)
CLASSES = {"label": {"type": "label", "num_classes": 5}, "action": {"type": "action", "num_action_classes": 3}, None: None}
KINDS = [
    ({}, None, 1.0),
    ({"slope_scale": 0.5}, None, 1.0),
    ({}, "label", 2.0),
    ({}, "action", 1.0),
    ({}, "action", 1.5),
    (TINY_FAR_LONG, "action", 1.5),
]


def tiny(changes: dict, kind: str | None) -> FAR:
    model = make_transformer({**TINY_FAR, "condition_cfg": CLASSES[kind], **changes})
    randomise(model, 4)
    return model.eval().requires_grad_(False)


def drawn(rows: int, num_kept: int, kind: str | None, seed: int) -> tuple[torch.Tensor, ...]:
    """Kept frames, noise, positions and classes at random."""
    rng = torch.Generator().manual_seed(seed)
    kept, noise = torch.randn(rows, num_kept, *LATENT, generator=rng), torch.randn(rows, 1, *LATENT, generator=rng)
    sizes = {"label": (rows,), "action": (rows, num_kept + 1)}
    classes = None if kind is None else torch.randint(0, 3, sizes[kind], generator=rng)
    return kept, noise, torch.arange(num_kept + 1), classes


@pytest.mark.parametrize(("changes", "kind", "guidance"), KINDS)
def test_a_repeated_pass_is_the_samplers_whatever_its_inputs_held_before(changes, kind, guidance):
    model = tiny(changes, kind)
    frame = CapturedFrame(model, FrameShape(7, LATENT, torch.float32, 2, guidance, kind), 3, repeated_in_place)
    answers, expected = [], []
    for seed, rows in enumerate((3, 1, 2, 3)):
        kept, noise, positions, classes = drawn(rows, 7, kind, seed)
        answers.append(frame(kept, noise, positions, classes))
        conditions = {} if kind is None else {kind: classes}
        expected.append(sample_next_frame(model, kept, noise, num_steps=2, guidance_scale=guidance, **conditions))
    assert torch.equal(answers[0], expected[0]) and torch.equal(answers[3], expected[3]), "and later calls change neither"
    for answer, right in zip(answers, expected, strict=True):
        # torch multiplies the few rows of modulations by class in an order that depends on their number
        torch.testing.assert_close(answer, right, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{}, TINY_FAR_LONG])
def test_positions_are_inputs(changes):
    kind = "action" if changes else None
    model = tiny(changes, kind)
    frame = CapturedFrame(model, FrameShape(7, LATENT, torch.float32, 2, 1.0, kind), 2, repeated_in_place)
    kept, noise, positions, classes = drawn(2, 7, kind, 0)
    near = frame(kept, noise, positions, classes)
    # rotary positions are relative, so a shift of all changes nothing, and a longer distance does
    torch.testing.assert_close(frame(kept, noise, positions + 5, classes), near, atol=1e-4, rtol=0)
    far = frame(kept, noise, 2 * positions, classes)
    assert (far - near).abs().max() > 1e-3
    times = torch.full((2, 8), -1.0)
    visible = torch.ones(8, 8, dtype=torch.bool).tril()
    options = {"num_coarse": model.num_coarse(8), "action": classes} if changes else {}
    latent = noise
    steps = (frame._sampler.times, frame._sampler.sigma_changes)
    for time, change in zip(*steps, strict=True):
        times[:, -1] = time
        sequence = torch.cat([kept, latent], dim=1)
        latent = latent + change * model.velocity(sequence, times, 2 * positions, visible, **options)[:, -1:]
    torch.testing.assert_close(far, latent, atol=1e-4, rtol=0)


def test_rows_of_one_length_need_no_mask_which_the_fastest_attention_would_refuse():
    model, noise = tiny(TINY_FAR_LONG, "action"), torch.zeros(2, 1, *LATENT)
    clean = sum(model.token_counts(7, noise))
    memory = model.new_memory(2, clean + model.tokens_per_frame(noise), noise)
    assert model.next_frame(memory, noise, [7, 7]).masks == [None, None]
    assert model.next_frame(memory, noise, [7, 6]).masks[0].shape == (2, 1, 16, clean + 16)


def test_a_graph_is_made_at_the_second_request_and_serves_up_to_half_its_rows():
    model = tiny({}, None)
    graphs = CudaGraphs(model, repeated_in_place)
    shape = FrameShape(2, LATENT, torch.float32, 1)
    assert graphs.find(shape, 4) is None
    graph = graphs.find(shape, 4)
    assert graph.num_rows == 4 and len(graphs) == 1
    assert graphs.find(shape, 3) is graph
    others = [(shape, 2), (shape, 5), (shape._replace(num_kept=3), 4), (shape._replace(num_steps=2), 4)]
    for other in others:
        assert graphs.find(*other) is None
    for other in others:
        assert graphs.find(*other).num_rows == other[1]
    assert graphs.find(shape, 3) is graph, "the smallest that fits"
    assert len(graphs) == 5


def test_the_graph_used_least_recently_makes_room():
    model, captured = tiny({}, None), []
    graphs = CudaGraphs(model, lambda compute: captured.append(compute) or compute, max_graphs=2)
    shapes = [FrameShape(num_kept, LATENT, torch.float32, 1) for num_kept in (1, 2, 3)]
    for shape in shapes:
        graphs.find(shape, 1)
    first, second = (graphs.find(shape, 1) for shape in shapes[:2])
    assert graphs.find(shapes[0], 1) is first
    assert graphs.find(shapes[2], 1) is not None and len(graphs) == 2
    assert graphs.find(shapes[0], 1) is first and len(captured) == 3
    assert graphs.find(shapes[1], 1) is None, "what made room is made again at its second request only"
    assert graphs.find(shapes[1], 1) not in (None, second) and len(captured) == 4


def test_a_graph_that_does_not_fit_is_not_tried_again():
    tries = []

    def full(compute):
        tries.append(compute)
        raise torch.OutOfMemoryError

    graphs = CudaGraphs(tiny({}, None), full)
    assert [graphs.find(FrameShape(1, LATENT, torch.float32, 1), 2) for _ in range(4)] == [None] * 4
    assert len(tries) == 1 and len(graphs) == 0


def test_after_another_error_in_making_a_graph_there_are_none_and_a_warning_says_why():
    tries = []

    def broken(compute):
        tries.append(compute)
        raise RuntimeError("operation failed due to a previous error during capture\nCUDA kernel errors might be …")

    graphs = CudaGraphs(tiny({}, None), broken)
    shapes = [FrameShape(num_kept, LATENT, torch.float32, 1) for num_kept in (1, 2)]
    assert graphs.find(shapes[0], 2) is None
    with pytest.warns(UserWarning, match="without CUDA graphs, because making one failed: .* during capture$"):
        assert graphs.find(shapes[0], 2) is None
    assert [graphs.find(shape, 2) for shape in shapes * 2] == [None] * 4 and len(tries) == 1


def test_a_graph_made_in_inference_mode_serves_calls_outside_of_it():
    model, shape = tiny({}, None), FrameShape(2, LATENT, torch.float32, 1)
    graphs = CudaGraphs(model, repeated_in_place)
    kept, noise, positions, _ = drawn(1, 2, None, 0)
    with torch.inference_mode():
        assert graphs.find(shape, 1) is None
        inside = graphs.find(shape, 1)(kept, noise, positions)
    with torch.no_grad():
        assert torch.equal(graphs.find(shape, 1)(kept, noise, positions), inside)


class OnlyOnTheGpu(TorchDispatchMode):
    """Refuses operations that read or make a tensor outside the GPU, and those whose shape or flow depends on values."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor) and value.device.type != "cuda":
                raise AssertionError(f"{func} has a tensor on {value.device}")
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise AssertionError(f"{func} depends on values")
        self.operations += 1
        return out


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors without values, which may claim to be on a GPU where there is none. Schedules have values, on the CPU."""

    def with_values(*args: object) -> FrameSampler:
        with unset_fake_temporarily(), torch.device("cpu"):
            return FrameSampler(*args)

    monkeypatch.setattr(cuda_graphs, "FrameSampler", with_values)
    with FakeTensorMode(), torch.device("cuda"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("changes", "kind", "guidance"), KINDS)
def test_what_is_captured_neither_waits_for_the_gpu_nor_uploads_to_it(fake_gpu, changes, kind, guidance, dtype):
    torch.set_default_dtype(dtype)
    try:
        model = make_transformer({**TINY_FAR, "condition_cfg": CLASSES[kind], **changes}).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    passes = []
    CapturedFrame(model, FrameShape(7, LATENT, dtype, 2, guidance, kind), 2, passes.append)
    for _ in range(2):  # the first one also computes what is shared by all later ones
        with torch.device("cpu"), OnlyOnTheGpu() as mode:
            (compute,) = passes
            latent = compute()
        assert latent.shape == (2, 1, *LATENT) and latent.dtype == dtype and mode.operations > 100


def test_what_would_break_a_capture_is_noticed(fake_gpu):
    model = FAR(**TINY_FAR).eval().requires_grad_(False)
    latents = torch.zeros(2, 1, *LATENT)
    memory = model.new_memory(2, 3 * 16, latents)
    with torch.device("cpu"):
        with OnlyOnTheGpu():
            model.next_frame(memory, latents, [2, 2])
        with pytest.raises(AssertionError, match="has a tensor on cpu"), OnlyOnTheGpu():
            model.next_frame(memory, latents, [1, 2])
        with pytest.raises(AssertionError, match="has a tensor on cpu"), OnlyOnTheGpu():
            latents.cpu()
        with pytest.raises((AssertionError, DataDependentOutputException)), OnlyOnTheGpu():
            bool((latents > 0).any())
        with pytest.raises(Exception, match="nonzero"), OnlyOnTheGpu():
            latents[latents > 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("changes", "kind", "guidance"), KINDS)
def test_a_cuda_graph_computes_what_the_pass_does(changes, kind, guidance, dtype):
    model = tiny(changes, kind).to("cuda", dtype)
    capture = CudaCapture(torch.device("cuda", torch.cuda.current_device()))
    shapes = [FrameShape(num_kept, LATENT, dtype, 2, guidance, kind) for num_kept in (7, 3)]
    frames = [CapturedFrame(model, shape, 3, capture) for shape in shapes]
    plain = [CapturedFrame(model, shape, 3, lambda compute: compute) for shape in shapes]
    for seed, rows in enumerate((3, 1, 2, 3)):
        for shape, frame, other in zip(shapes, frames, plain, strict=True):
            inputs = [x if x is None else x.cuda() for x in drawn(rows, shape.num_kept, kind, seed)]
            torch.testing.assert_close(frame(*inputs), other(*inputs))

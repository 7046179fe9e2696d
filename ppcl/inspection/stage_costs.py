"""The arithmetic of :mod:`ppcl.inspection.estimate`: each stage in FLOPs, bytes that are read, and bytes that are kept.

Shapes, as in :class:`ppcl.inspection.shapes.Shapes`: M blocks of P numbers, states of s bytes between two blocks, N
training states, E held-out states behind costs, K vectors behind prices, R runs, C fitted candidates.

* capture: prompts x steps x guidance branches calls of the transformer; where blocks are streamed each reads them all.
* analyze: a forward sweep; products for sums in float32, solves of d^3 terms in float64.
* fit: sweeps over E states; a backward sweep of 1 + 2 K forward passes; what replaces a run that ends at block i is
  carried through the M - i blocks after it, M / 2 on average; C x steps training steps of three forward passes.
* distill: a sweep over N states and training steps of three forward passes for each substitute; the output stage three
  passes of the student beside one of the teacher.
* evaluate: pictures of teacher and student.

A sweep keeps two levels of states, and those that somebody holds; in RAM up to a limit, else all on disk.
"""

from __future__ import annotations

from collections.abc import Iterator

from ppcl.analysis.prices import BRANCHES
from ppcl.analysis.sweep import ARGUMENTS
from ppcl.config import EvaluateConfig
from ppcl.config.memory import STEPS
from ppcl.config.names import PICTURE_RUNS, WARMUP
from ppcl.distill.correction import RIDGES, ROWS_PER_FEATURE
from ppcl.distill.memory import FLOAT, optimizer_bytes
from ppcl.inspection.costs import Costs, StageCost, Work
from ppcl.inspection.shapes import Part

MOVED = 28  # bytes that AdamW reads and writes for a number, its gradient among them
DOUBLE = 8  # bytes of a float64


def stage_costs(costs: Costs) -> Iterator[StageCost]:
    """What each stage takes, in their order; each is put on the disk that the ones before it left."""
    left = 0.0
    for stage in (capture_cost, analyze_cost, fit_cost, plan_cost, distill_cost, export_cost, evaluate_cost):
        cost = stage(costs, left)
        left = cost.left
        yield cost


def capture_cost(costs: Costs, before: float) -> StageCost:
    """Trajectories of the teacher, or one call for each noised picture."""
    shapes, settings = costs.shapes, costs.config.capture
    batch = costs.samples(settings.batch_size)
    device, ram = costs.drawing()
    work = Work(kept=costs.num_states * shapes.record, ram=ram, device=device + batch * shapes.forward)
    passes = costs.passes(settings.num_prompts, settings.batch_size, settings.num_inference_steps)
    work.flops = costs.num_states * shapes.info.flops
    if costs.sampling:
        work.flops = settings.num_prompts * settings.num_inference_steps * costs.branches * shapes.info.flops
    else:
        passes = -(-costs.num_states // settings.batch_size)
    _read(costs, work, passes, shapes.text + shapes.vae)
    return costs.cost("capture", work, costs.teacher(), before)


def _read(costs: Costs, work: Work, passes: float, others: float = 0.0, ratio: float = 1.0) -> None:
    """Count weights: of streamed blocks at every pass, of resident ones once, by way of RAM."""
    blocks = ratio * costs.shapes.in_blocks
    work.files += others + costs.shapes.outside
    if costs.streamed:
        work.weights += passes * blocks
    else:
        work.files += blocks
        work.ram += blocks + costs.shapes.outside + others if costs.on_gpu else 0.0


def _sweep(costs: Costs, work: Work, states: float, passes: float = 1.0) -> None:
    """Count a sweep of so many states through all blocks."""
    work.flops += passes * states * costs.shapes.info.flops
    work.weights += costs.shapes.in_blocks if costs.streamed else 0.0


def sums_of(part: Part) -> int:
    """Bytes of one block's sums of both splits, and of what solving the largest takes beside them."""
    sides = [*part.streams, *part.networks, *([part.text] if part.text else [])]
    largest = max(sides, default=0)
    return DOUBLE * (2 * sum(2 * d * d for d in sides) + 5 * largest * largest)


def analyze_cost(costs: Costs, before: float) -> StageCost:
    """One forward sweep over all states with sums of one block; then closed forms and the table of CKA."""
    shapes, settings, states = costs.shapes, costs.config.analyze, costs.num_states
    size, batch = shapes.state_bytes, settings.batch_size
    work = Work()
    _sweep(costs, work, states)
    forms = found = 0.0
    for part in shapes.parts:
        kept = [*part.streams, *part.networks]
        for d in [*kept, *([part.text] if part.text else [])]:
            rows = states * shapes.tokens / max(1, len(part.streams))
            rows = min(rows, 2 * settings.rows_per_feature * d) if settings.rows_per_feature else rows
            work.float32 += part.count * rows * 4 * d * d
            work.float64 += part.count * len(settings.ridges) * (d**3 / 3 + 8 * d**3)
        work.float64 += part.count * sum(4 * o * d * d for o, d in part.modulation)
        pairs = part.count * part.count / 2
        tokens = min(settings.cka_tokens, costs.held_out * shapes.tokens)
        work.float32 += pairs * sum(4 * tokens * d * d for d in part.streams)
        forms += shapes.itemsize * part.count * sum(d * d for d in kept)
        forms += FLOAT * sum(d * d for _, d in part.modulation)  # all blocks share them
        found += part.count * (DOUBLE * sum(d * d for d in part.streams) + FLOAT * sum(d * d for d in part.networks))
    work.device = batch * (shapes.forward + 3 * FLOAT * shapes.state) + max(map(sums_of, shapes.parts))
    work.ram += min(ARGUMENTS, states * shapes.record)
    waiting = work.store(2 * states * size, states * size * shapes.blocks, states * size * shapes.blocks)
    work.kept, work.disk = forms, waiting + found + forms
    work.files += 2 * found + forms
    return costs.cost("analyze", work, costs.teacher(), before, shared=True)


def _units(costs: Costs, work: Work) -> tuple[float, float, float]:
    """Count what smaller modules take: options of a block, bytes of their closed forms, bytes of their sums."""
    shapes, settings = costs.shapes, costs.config.fit
    if not settings.width:
        return 0.0, 0.0, 0.0
    _sweep(costs, work, min(settings.width_states, costs.train))
    rows = min(settings.width_states, costs.train) * shapes.tokens
    shares = settings.width_shares
    options, forms, sums = 0.0, 0.0, 0.0
    for part in shapes.parts:
        hidden = part.hidden if "ffn" in settings.width else ()
        each = len(settings.modulation_tolerances) if "modulation" in settings.width and part.modulation else 0
        each += len(hidden) * (1 + len(shares)) + ("text" in settings.width and bool(part.text))
        each += len(shares) * len(part.streams) * ("attention" in settings.width)
        options += part.count * each
        for units, outputs in hidden:
            forms += part.count * sum(shares) * units * outputs * shapes.itemsize
            work.float32 += part.count * rows / len(hidden) * 2 * units * units
            work.float64 += part.count * sum((s * units) ** 3 / 3 + 2 * (s * units) ** 2 * outputs for s in shares)
        widest = max((units for units, _ in hidden), default=0)
        sums = max(sums, DOUBLE * (sum(units * units for units, _ in hidden) + 3 * widest * widest))
    work.files += 2 * forms
    return options, forms, sums


def fit_cost(costs: Costs, before: float) -> StageCost:
    """Prices of all options, costs of runs by their probes, and a short training of the best of them."""
    shapes, settings = costs.shapes, costs.config.fit
    size, batch, blocks = shapes.state_bytes, settings.batch_size, shapes.blocks
    states, vectors = min(settings.eval_states, costs.held_out), settings.vectors
    largest = max(part.params for part in shapes.parts)
    work = Work()
    _sweep(costs, work, states)
    options, forms, sums = _units(costs, work)
    _sweep(costs, work, states, 1 + 2 * vectors)
    work.flops += options * states * costs.block_flops
    levels = work.store((blocks + 1) * states * size, (blocks + 1) * states * size, 2 * blocks * states * size)
    gradients = work.store(2 * vectors * states * size, *[vectors * states * size * blocks] * 2)
    fits = min(settings.max_candidates, costs.num_candidates)
    carried = fits + (costs.num_candidates if settings.exact != "none" else 0)
    carried += int(options) if settings.exact == "all" else 0
    branches = _carry(costs, work, carried, states)
    drawn = min(costs.train, settings.steps * batch)  # at most: all runs learn from the same batches
    _sweep(costs, work, drawn)
    fitted = fits * sum(part.count * part.params for part in shapes.parts) / blocks  # numbers, of all stacks alike
    steps = fits * settings.steps * batch
    work.flops += (3 * steps + fits * len(settings.starts) * states) * costs.block_flops
    work.moved += MOVED * settings.steps * fitted
    weights = costs.shapes.block * fits * len(settings.starts)
    work.files += weights if costs.streamed else 0.0
    between = (settings.max_run + 2) * drawn * size
    trained = work.store(between, drawn * size * blocks, drawn * size * blocks + 2 * steps * size)
    results = fitted * shapes.itemsize
    work.kept = results + forms
    work.disk = levels + forms + max(gradients, branches, trained + results, results + work.kept)
    work.files += 3 * results
    step = FLOAT * largest + optimizer_bytes(largest, "adamw") + shapes.step_bytes(batch)
    probes = max((settings.max_run - 1) * sum(d * d for d in part.streams) * FLOAT for part in shapes.parts)
    backward = batch * (shapes.backward + 2 * vectors * size) + probes + forms / blocks * 2
    work.device = max(step, backward, batch * shapes.forward + sums)
    work.ram += min(ARGUMENTS, costs.num_states * shapes.record)
    return costs.cost("fit", work, costs.teacher(), before, shared=True)


def _carry(costs: Costs, work: Work, jobs: int, states: int) -> float:
    """Count replacements that are each carried to the end, half of the blocks on average; returns bytes on disk."""
    shapes = costs.shapes
    work.flops += jobs * states * costs.block_flops * shapes.blocks / 2
    size = states * shapes.state_bytes
    together = max(1, int(BRANCHES // size))
    work.weights += -(-jobs // together) * shapes.in_blocks if costs.streamed else 0.0
    return work.store(2 * min(jobs, together) * size, *[jobs * size * shapes.blocks / 2] * 2)


def plan_cost(costs: Costs, before: float) -> StageCost:
    """Arithmetic on measured costs."""
    mode = costs.config.plan.mode
    notes = (f"plan.mode={mode} runs the teacher, too: not counted",) if mode in ("path", "learned", "rarts") else ()
    return costs.cost("plan", Work(), 0.0, before, notes=notes)


def distill_cost(costs: Costs, before: float) -> StageCost:
    """The training of the plan's substitutes."""
    shapes, settings, count = costs.shapes, costs.config.distill, costs.num_substitutes
    largest = max(part.params for part in shapes.parts)
    numbers, states = costs.trained, costs.train
    alone = costs.streamed or settings.one_at_a_time
    asked = {name.removesuffix("_steps"): getattr(settings, name) for name in STEPS}
    whole = {} if costs.streamed else {name: asked[name] for name in ("alternating", "output") if asked[name]}
    left_out = [name for name in ("alternating", "output") if asked[name] and name not in whole]
    work = Work()
    here = largest if alone else numbers
    part = -(-settings.batch_size // settings.accumulate)
    if not costs.streamed:
        part = -(-part // costs.hardware.count)
    work.device = here * (FLOAT + (FLOAT if settings.ema_decay else 0)) + optimizer_bytes(here, settings.optimizer)
    work.device += shapes.step_bytes(part) + (0 if alone or settings.releases_gradients else FLOAT * numbers)
    on_the_way = 0.0
    if settings.correct:
        _correction(costs, work)
    for name in ("local", "carried"):
        samples = asked[name] * settings.batch_size
        work.flops += samples * (
            3 * count * costs.block_flops + (0 if alone or name == "carried" else shapes.info.flops)
        )
        work.moved += (MOVED + 2 * FLOAT) * asked[name] * numbers
        training = levels = 0.0
        if (asked[name] and alone) or (name == "carried" and settings.walks):
            walkers = 2 if name == "carried" else 1
            _sweep(costs, work, walkers * states)
            swept = states * shapes.state_bytes
            passed = walkers * swept * shapes.blocks
            # a substitute is trained with what enters its run beside the sweep's two levels; then the student moves on
            levels = work.store((walkers + 2) * swept, passed, passed + 2 * samples * count * shapes.state_bytes)
            training = 3 * swept if levels else 0.0
        checkpoints = settings.keep_checkpoints + 1 if asked[name] > settings.checkpoint_every else 1  # one at the end
        saved = checkpoints * here * 4 * FLOAT if asked[name] else 0.0
        on_the_way = max(on_the_way, levels, training + saved)
    for steps in whole.values():
        work.flops += (
            steps * settings.batch_size * (3 * costs.plan[1].params / shapes.info.params + 1) * shapes.info.flops
        )
        work.device = max(work.device, _whole_student(costs, numbers, part))
    if settings.few_steps.num_inference_steps and not costs.streamed:
        _few_steps(costs, work)
        work.device = max(work.device, _whole_student(costs, numbers, part))
    work.kept = shapes.itemsize * numbers
    work.disk = work.kept + max(on_the_way, work.kept)  # finished substitutes, and last the bundle beside them
    work.files += 3 * work.kept
    notes = (f"{' and '.join(left_out)} stage left out: blocks are streamed",) if left_out else ()
    return costs.cost("distill", work, costs.teacher(alone=True), before, shared=True, notes=notes)


def _few_steps(costs: Costs, work: Work) -> None:
    """Count the teacher's trajectories, and the student's walks along them."""
    few, capture, settings = costs.config.distill.few_steps, costs.config.capture, costs.config.distill
    teacher = (few.teacher_steps or capture.num_inference_steps) * costs.branches + few.num_inference_steps
    student = 3 * few.training_steps * settings.batch_size * few.num_inference_steps * costs.ratio
    work.flops += (few.num_trajectories * teacher + student) * costs.shapes.info.flops


def _correction(costs: Costs, work: Work) -> None:
    """Count the least squares of each substitute's last layers, feed-forward networks of four times the width."""
    shapes, count = costs.shapes, costs.num_substitutes
    work.flops += costs.train * count * costs.block_flops
    for d in max((part.streams for part in shapes.parts), key=sum):
        rows = min(costs.train * shapes.tokens, ROWS_PER_FEATURE * 4 * d)
        work.float32 += count * rows * 2 * (4 * d) ** 2
        work.float64 += count * len(RIDGES) * (4 * d) ** 3 / 3


def _whole_student(costs: Costs, numbers: int, batch: int) -> float:
    """Bytes of a stage that trains through the whole student: activations of all its blocks, or of one."""
    shapes, settings = costs.shapes, costs.config.distill
    total = int(costs.ratio * shapes.info.params)
    trained = total if settings.train == "all" else numbers
    depth = sum(len(pieces) for pieces in costs.plan[0].values())
    activations = batch * shapes.step[2] * (1 if settings.checkpointing else depth)
    activations += batch * shapes.state_bytes * depth
    each = 2 * FLOAT + (FLOAT if settings.ema_decay else 0)
    return trained * each + optimizer_bytes(trained, settings.optimizer) + activations


def export_cost(costs: Costs, before: float) -> StageCost:
    """Weights that are read and written."""
    shapes = costs.shapes
    others = 0.0 if costs.config.export.components == "link" else shapes.text + shapes.vae
    written = costs.ratio * (shapes.in_blocks + shapes.outside)
    work = Work(kept=written + others, files=2 * (written + others))
    if not costs.streamed:
        work.device = FLOAT * costs.trained
        return costs.cost("export", work, costs.teacher(), before)
    return costs.cost("export", work, shapes.outside, before)


def timed_work(settings: EvaluateConfig, branches: int, joined: bool) -> tuple[int, int]:
    """Samples and calls of a transformer behind the times, the memory and the FLOPs of a model.

    Args:
        settings: What is timed; the transformer alone with a whole batch, too.
        branches: Samples of a prompt, with guidance two.
        joined: All branches are one call.
    """
    whole, once = settings.num_inference_steps, settings.latency_runs + WARMUP + 1
    picture = min(PICTURE_RUNS, settings.latency_runs) + WARMUP + 1
    counts = {*(settings.speed_steps or (whole, max(1, whole // 2)))}
    drawn = [(size, steps) for size in settings.speed_batch_sizes for steps in counts]
    drawn += [] if (1, whole) in drawn else [(1, whole)]
    batch = settings.latency_runs + WARMUP
    sizes = settings.speed_batch_sizes
    samples = batch * settings.batch_size + once * sum(sizes) + 1
    calls = batch + once * len(sizes) + 1
    samples += picture * branches * sum(size * steps for size, steps in drawn)
    return samples, calls + picture * (1 if joined else branches) * sum(steps for _, steps in drawn)


def evaluate_cost(costs: Costs, before: float) -> StageCost:
    """Pictures of both, and times."""
    shapes, settings = costs.shapes, costs.config.evaluate
    flops, student = shapes.info.flops, shapes.info.flops / max(1.0, costs.plan[1].speedup)
    pictures = settings.num_prompts * settings.num_inference_steps * costs.branches
    timed, timed_calls = timed_work(settings, costs.branches, shapes.joined)
    device, ram = costs.drawing()
    work = Work(kept=settings.num_prompts * 2e6 * (settings.teacher_seeds + 1), ram=ram)
    again = min(settings.diversity_prompts, settings.num_prompts) / settings.num_prompts  # with a second seed
    draws = max(0.0, max(settings.teacher_seeds, 1 + again) - costs.drawn)
    work.flops = pictures * (draws * flops + (1 + again) * student)
    work.flops += (settings.velocity_states + timed) * (flops + student)
    passes = costs.passes(settings.num_prompts, settings.batch_size, settings.num_inference_steps)
    both = draws + (1 + again) * costs.ratio
    _read(costs, work, passes * both + timed_calls * (1 + costs.ratio), shapes.text + shapes.vae)
    largest = max(settings.batch_size, *settings.speed_batch_sizes)
    states = max(costs.samples(largest), settings.velocity_states)
    work.device = device + max(states * shapes.forward, largest * shapes.decode)
    second: float = shapes.outside + 2 * shapes.block
    if not costs.streamed:  # a pipeline of its own, and the substitutes before training
        second = costs.ratio * (shapes.in_blocks + shapes.outside) + shapes.text + shapes.vae
        second += FLOAT * costs.trained
        work.files += second
    return costs.cost("evaluate", work, costs.teacher() + second, before)

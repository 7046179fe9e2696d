"""Pictures to start from, for teachers that want some where there are no data: drawn from prompts by another pipeline.

They lie in ``RUN/calibration/sources``, each with the prompt that the teacher gets beside it, and are read as captioned
pictures of ``capture.data`` are: some calibrate, others evaluate. What fills a mask or makes a video gets the prompt
that its picture was drawn from; what edits gets another one.
"""

from __future__ import annotations

import json
from pathlib import Path

from ppcl.capture.prompts import BUILT_IN, DRAWN, read_prompts
from ppcl.common.files import write_text
from ppcl.config.names import TEACHER
from ppcl.errors import ModelError
from ppcl.run.session import Session

TABLE = "metadata.jsonl"


def check_sources(session: Session) -> None:
    """Refuse ``capture.sources`` that have no use, or cannot be drawn, before anything is.

    Raises:
        ModelError: They have none, or they cannot.
    """
    from ppcl.teacher.loading import check_model, fetch_files, pipeline_class
    from ppcl.teacher.pipeline_call import check_call, picture_arguments

    teacher, given = type(session.teacher), session.config.capture.sources
    if not picture_arguments(teacher):
        raise ModelError(f"{teacher.__name__} starts from no picture, so capture.sources has no use; leave it out")
    if given != TEACHER:
        check_model(given)
        fetch_files(given)
    drawer = teacher if given == TEACHER else pipeline_class(given)
    try:
        check_call(drawer, False)
        if given == TEACHER:  # some have a picture among what may be left out, and fail without
            _try(session)
    except (ModelError, AttributeError):
        name = given if drawer is None else drawer.__name__
        raise ModelError(
            f"capture.sources={given}: {name} does not draw from a prompt alone; name a text-to-image pipeline, e.g. "
            "capture.sources=Qwen/Qwen-Image, or set capture.data to captioned pictures (docs/data.md)"
        ) from None


def _try(session: Session) -> None:
    """Have the teacher draw one step from a prompt alone."""
    from ppcl.teacher.pipeline_call import call_pipeline, guidance_arguments

    arguments = guidance_arguments(session.teacher, session.config.capture)
    text = session.texts[0][:1]
    call_pipeline(session.teacher, text, num_inference_steps=1, output_type="latent", **arguments)


def draw_sources(session: Session) -> None:
    """Draw them into the run's calibration folder, unless they are there; pictures of an attempt before are kept."""
    import torch

    from ppcl.common.streams import Stream, step_generator
    from ppcl.config import CaptureConfig
    from ppcl.eval.generate import generate
    from ppcl.eval.models import call_arguments
    from ppcl.teacher.loading import on_device, open_pipeline

    folder, settings = session.calibration / DRAWN, session.config.capture
    if (folder / TABLE).is_file():
        return
    texts, shown = _texts(session)
    pipeline = session.teacher
    if settings.sources != TEACHER:
        session.release_teacher()
        pipeline = on_device(settings.sources, open_pipeline(settings.sources, session.device, None), session.device)
    size = CaptureConfig(height=settings.height, width=settings.width)  # type: ignore[call-arg]
    seed = int(torch.randint(2**31, (1,), generator=step_generator(session.config.seed, 0, Stream.SOURCE_PICTURES)))
    paths = generate(
        pipeline,
        shown,
        folder,
        seed=seed,
        num_inference_steps=settings.num_inference_steps,
        batch_size=settings.batch_size,
        call_kwargs=call_arguments(pipeline, size),
        label="pictures to start from",
        model=settings.sources,
    )
    rows = [{"file_name": path.name, "text": text} for path, text in zip(paths, texts, strict=True)]
    write_text(folder / TABLE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _texts(session: Session) -> tuple[list[str], list[str]]:
    """The teacher's prompts, and what the picture beside each is drawn from."""
    from ppcl.teacher.pipeline_call import call_parameters, picture_arguments

    kind, config = type(session.teacher), session.config
    count = config.capture.num_prompts + config.evaluate.num_prompts
    texts = list(dict.fromkeys(text for part in session.texts for text in part))[:count]
    if "num_frames" in call_parameters(kind) or "mask_image" in picture_arguments(kind):
        return texts, texts
    others = texts if session.prompts is None else read_prompts(Path(BUILT_IN))
    return texts, [others[(number + 1) % len(others)] for number in range(len(texts))]

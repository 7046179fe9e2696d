"""Every number of an evaluation, once: its name, what is better, how it is shown and what it means. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "neither"]
Over = Literal["pictures", "references", "states"]  # what the items behind a number are
ARROWS = {"higher": " \N{UPWARDS ARROW}", "lower": " \N{DOWNWARDS ARROW}", "neither": ""}


@dataclass(frozen=True)
class Metric:
    """One number.

    Attributes:
        label: Its name in tables.
        better: Which way is better.
        meaning: A sentence for people who do not know it.
        shown_as: ``number``, ``share`` (percent on the page), ``count`` or ``bytes``.
        unit: What the stored value is multiplied by in Markdown tables, and the name of the result.
    """

    label: str
    better: Better
    meaning: str = ""
    shown_as: Literal["number", "share", "count", "bytes"] = "number"
    unit: tuple[float, str] = (1.0, "")

    @property
    def heading(self) -> str:
        """The label with an arrow to where it is better."""
        return self.label + ARROWS[self.better]

    @property
    def in_unit(self) -> str:
        """The label with the unit of Markdown tables."""
        return f"{self.label} ({self.unit[1]})" if self.unit[1] else self.label


SCORES = {  # of one set of pictures
    "fid": Metric(
        "FID",
        "lower",
        "Distance between the statistics of these pictures and of the reference pictures. It judges the whole set, "
        "not single pictures, and it is too high for small sets: compare models with each other only.",
    ),
    "kid": Metric(
        "KID", "lower", "The same question as FID by another statistic, which is not biased by the number of pictures."
    ),
    "kid_std": Metric("KID, standard deviation of subsets", "neither"),
    "cmmd": Metric(
        "CMMD",
        "lower",
        "The same question again, asked of the embedding that judges prompts: a distance between means, slightly "
        "biased upwards for few pictures.",
    ),
    "precision": Metric(
        "Precision", "higher", "How many of these pictures lie near reference pictures: plausible ones.", "share"
    ),
    "recall": Metric(
        "Recall", "higher", "How many reference pictures lie near these pictures: the variety is kept.", "share"
    ),
    "density": Metric(
        "Density",
        "higher",
        "How many reference pictures lie near each of these, by what is usual among them; 1 or more is good.",
    ),
    "coverage": Metric(
        "Coverage", "higher", "How many reference pictures have one of these as a near neighbour.", "share"
    ),
    "clip_score": Metric(
        "CLIP score",
        "higher",
        "How well each picture fits its own prompt: 100 times the cosine of their embeddings, averaged.",
    ),
    "retrieval_at_1": Metric(
        "Retrieval at 1",
        "higher",
        "How often the picture's own prompt comes first among all prompts of the evaluation.",
        "share",
    ),
    "retrieval_at_5": Metric(
        "Retrieval at 5", "higher", "How often the picture's own prompt is among the first five.", "share"
    ),
    "diversity": Metric(
        "Diversity",
        "higher",
        "How much two pictures of one prompt differ when the noise is another: 1 - SSIM, averaged; 0 if all noise "
        "becomes the same picture. A model that is more uniform than the first one has lost variety.",
    ),
}
FIDELITY = {  # of pairs: a model's pictures or velocities against the first model's
    "velocity_error": Metric(
        "Velocity error",
        "lower",
        "Relative difference of the transformer's output on denoising states, without any sampler; 0 is identical. "
        "For scale: the same student before distillation.",
    ),
    "psnr": Metric(
        "PSNR, dB",
        "higher",
        "Pixel by pixel likeness of pairs; higher is closer. For scale, here and below: the first model against its "
        "own picture of the same prompt with another seed.",
    ),
    "ssim": Metric("SSIM", "higher", "Likeness of local structure; 1 is identical."),
    "lpips": Metric("LPIPS", "lower", "Learned perceptual distance; 0 is identical."),
    "texture_distance": Metric(
        "Texture distance",
        "lower",
        "Distance between the statistics of fine detail of both models' pictures: sharpness, grain, and where detail "
        "sits. It sees blur and missing detail which the features behind FID overlook.",
    ),
    "feature_cosine": Metric("Feature cosine", "higher", "Likeness in the evaluator's embedding; 1 is identical."),
}
DROP = {
    "average_drop": Metric(
        "Average drop, %",
        "lower",
        "What is lost of the caption scores: the mean of their relative losses against the first model, in percent; "
        "negative is a gain.",
    )
}
COSTS = {
    "params": Metric("Parameters", "lower", shown_as="count", unit=(1e-6, "M")),
    "latency_ms": Metric("Transformer call, ms", "lower"),
    "latency_end_to_end_ms": Metric("One picture, ms", "lower"),
    "peak_memory_bytes": Metric("Peak memory", "lower", shown_as="bytes", unit=(1e-6, "MB")),
    "flops": Metric("FLOPs of a call for one prompt", "lower", shown_as="count", unit=(1e-9, "GFLOPs")),
}
METRICS: dict[str, Metric] = {**DROP, **FIDELITY, **SCORES}
SHARES = tuple(name for name, metric in METRICS.items() if metric.shown_as == "share")
PSNR_CAP_DB = 100.0  # equal pictures would be infinite
CAPTION_SCORES = ("clip_score", "retrieval_at_1", "retrieval_at_5")  # behind the average drop

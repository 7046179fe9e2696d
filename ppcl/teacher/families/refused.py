"""Classes that are known not to work, and why. What is missing in each could be built; a wrong result is worse."""

_UNET_PART = "it is a part of U-Nets, not a diffusion transformer of its own"

REFUSED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "its blocks keep a cache for each block's number",
    "BriaFibo2Transformer2DModel": "text enters at blocks that its config names by number",
    "BriaFiboTransformer2DModel": "each block gets its own layer of the text encoder, by the block's number",
    "ChromaTransformer2DModel": "its blocks' modulation is read from one table by the block's number",
    "ConsisIDTransformer3DModel": "face features enter at every so many blocks, by number",
    "DiTTransformer2DModel": "its pipeline takes class labels, and states are recorded from prompts",
    "DreamLiteTransformer2DModel": _UNET_PART,
    "EasyAnimateTransformer3DModel": "its config says by number from where on blocks have other weights (mmdit_layers)",
    "Flux3Transformer2DModel": "one count field is shared by the block lists of several modes",
    "HiDreamImageTransformer2DModel": "each block gets its own layer of the text encoder, by the block's number",
    "HunyuanDiT2DModel": "its blocks are joined by U-Net skips between the first and the second half",
    "Kandinsky6Transformer3DModel": "its blocks carry video and audio as separate streams",
    "LTX2VideoTransformer3DModel": "its blocks carry video and audio as separate streams",
    "LatteTransformer3DModel": "spatial and temporal blocks take turns and share one count field",
    "MiniMaxMusic3RVQDepthDecoder": "it writes audio codes one after another and denoises nothing",
    "MotifVideoTransformer3DModel": "its last blocks are a decoder with other inputs, told apart by number",
    "NucleusMoEImageTransformer2DModel": "which blocks have experts, and how many, depends on their number",
    "PriorTransformer": "it predicts one embedding of a picture, not a picture",
    "SanaWMTransformer3DModel": "its blocks differ by number",
    "T5FilmDecoder": "it makes spectrograms and takes no prompt",
    "Transformer2DModel": _UNET_PART,
    "TransformerTemporalModel": _UNET_PART,
    "WanAnimateTransformer3DModel": "a face adapter follows every fifth block, by number",
    "WanVACETransformer3DModel": "its config ties control blocks to block numbers (vace_layers)",
}

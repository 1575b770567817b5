"""The engine: the one owner of a model at run time.

- request: what goes in and what comes out
- features: pictures to visual tokens, each distinct picture once
- cache: where visual tokens are kept, bounded in bytes
- sampling: logits to the next token, and how likely it was
- grammar: answers that are JSON by a schema
- stops: the end of an answer before a stop string
- loops: the end of an answer that only repeats itself
- task: a request on its way; scheduler: which ones run, in plain Python
- slots: keys and values of all running rows; attention: which token sees what
- prefixes: keys and values of earlier prompts, so that shared beginnings are computed once
- decoders: which way a decoder is run; lean: the fastest, for the Llama family, by blocks (its
  layers taken apart) and rotary (angles by position); compiled: its steps in fixed shapes
- packed: weights rearranged for the CPU's kernels
- arrivals: requests that are made in threads meanwhile; in_order: any number of them, few in
  memory; batches: the same where only whole batches run
- runner: one step after the other
- generate: the same for models that are not ours, by their own `generate`
- stream: tokens to pieces of text
- turns: whose turn it is to run the model
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlm.engine.generate import GenerateEngine
    from vlm.engine.runner import Engine
    from vlm.processor import Processor
    from vlm.relative_processor import RelativeProcessor


def start(
    model: "PreTrainedModel",
    processor: "Processor | RelativeProcessor",
    identity: str | None,
    compile: bool = False,
) -> "Engine | GenerateEngine":
    """What runs this model: our own engine for a LLaVA, its `generate` for any other."""
    from vlm.engine.runner import Engine
    from vlm.processor import Processor

    if isinstance(processor, Processor):
        engine = Engine(model, processor, identity, compile=compile)
        if compile:
            engine.optimize()  # compiled steps rely on where the weights lie
        return engine
    from vlm.engine.generate import GenerateEngine

    return GenerateEngine(model, processor, identity)

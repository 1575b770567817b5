"""The engine: the one owner of a model at run time.

- request: what goes in and what comes out
- features: pictures to visual tokens, each distinct picture once
- cache: where visual tokens are kept, bounded in bytes
- sampling: logits to the next token
- runner: prefill and decode of a batch
- stream: tokens to pieces of text
- turns: whose turn it is to run the model
"""

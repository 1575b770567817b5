"""The same model by the OpenAI API, on the same port and the same engine as the page.

- schema: what a request may say; conversation: its messages and pictures
- limits: how much of everything; intake: bodies of bounded size and time; problems: errors
- desk: answers that run together; told: what of an answer has been sent; replies: their shape
- metrics: numbers for Prometheus
- service: what all of these share; routes: the addresses
"""

"""The commands, one module each: `add_arguments(parser)` says what it takes, `run(options, parser)` does it.

A module is imported when its command is called, and at its top imports nothing that takes time. What several share is in
`options` (arguments), `loading` (a model, with a bar), `answers` (a prompt to tokens), `terminal` (printing) and `figures`
(how fast it was).
"""

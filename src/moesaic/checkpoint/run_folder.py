"""The names in a run folder. Who writes or reads one takes its name from here.

===================  ==============================================
config.json          settings, model and versions
adapter_config.json  peft's config of the adapters, if any
tokenizer/           the tokenizer, as transformers saves it
metrics.jsonl        one line for every logged step
tensorboard/         the same numbers as TensorBoard events
profile/             traces of steps, if asked for
checkpoints/         step-00000100, ...
export/              the trained model in Hugging Face format
result.json          what was measured at the end
report.html          a page about the run, of `moesaic report`
lock                 which process writes into the folder
failures/            rank-0.log, ...: tracebacks, if there were any
===================  ==============================================
"""

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER = "tokenizer"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
CHECKPOINTS = "checkpoints"
EXPORT = "export"
RESULT = "result.json"
REPORT = "report.html"
LOCK = "lock"
FAILURES = "failures"

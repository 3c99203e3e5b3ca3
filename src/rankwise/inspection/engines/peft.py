"""Hugging Face PEFT, whose directories are the field's wire format."""

from rankwise.inspection.engines.rules import Case, Engine, Rule, no_note, own_form


def _unlike_peft(case: Case) -> tuple[str, ...]:
    return tuple(case.facts.unlike_peft)


PEFT = Engine(
    label="PEFT",
    version="0.21.2",
    format="peft",
    rules=(
        Rule(
            "layers' own state",
            "refuses",
            "its peft_type is of rankwise alone",
            "peft/config.py: PeftConfigMixin.from_peft_type",
            "none",
            own_form,
        ),
        Rule(
            "a convolution with dilation or padding of its own",
            "misreads",
            "lora_A is a convolution that lacks them",
            "peft/tuners/lora/layer.py: _ConvNd.update_layer",
            "merge",
            _unlike_peft,
        ),
    ),
    note=no_note,
    start="PeftModel.from_pretrained(model, {path})",
    start_merged="AutoModelForCausalLM.from_pretrained({path})",
)

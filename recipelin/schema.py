"""JSON Schema of a recipe as it is written in YAML, for editors (no torch)."""

import json
from typing import Any

from pydantic import TypeAdapter

from . import lookup
from .recipe import Recipe
from .schedule import Schedule
from .states import NAMES


def recipe_schema() -> dict[str, Any]:
    """Draft 2020-12. `method` is one of the methods' Configs, told apart by name; stages may be given in part."""
    schema = TypeAdapter(Recipe).json_schema(ref_template="#/$defs/{model}")
    definitions = schema["$defs"]
    methods = []
    stages: set[str] = set()
    for name in lookup.names("methods"):
        module = lookup.lookup("methods", name)
        own = module.Config.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(own.pop("$defs", {}))
        own["required"] = sorted({*own.get("required", []), "name"})
        definitions[f"method_{name}"] = own
        methods.append({"$ref": f"#/$defs/method_{name}"})
        stages |= set(module.STAGES)
    schema["properties"]["method"] = {
        "oneOf": methods,
        "discriminator": {"propertyName": "name"},
        "description": "what is done to the model",
    }
    stage = TypeAdapter(Schedule).json_schema(ref_template="#/$defs/{model}")
    definitions.update(stage.pop("$defs", {}))
    definitions["Schedule"] = stage
    either = {"anyOf": [{"$ref": "#/$defs/Schedule"}, {"type": "null"}]}
    schema["properties"]["schedule"] = {
        "type": "object",
        "properties": dict.fromkeys(sorted(stages), either),
        "additionalProperties": False,
        "description": "stages of the method; what is not given comes from the method; null leaves a stage out",
    }
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "path or name of a recipe that this one changes (one level)",
    }
    definitions["Evaluation"]["properties"]["suites"] = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string"},
        "description": "names of recipes/suites",
    }
    definitions["StateOf"]["properties"]["of"]["enum"] = list(NAMES)
    architecture = definitions["Model"]["properties"]["architecture"]
    architecture["anyOf"].append({"type": "string", "description": "path of a config.json"})
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "recipelin recipe"
    # A recipe that extends another leaves out what it takes over.
    schema.pop("required", None)
    schema["anyOf"] = [{"required": ["extends"]}, {"required": ["name", "model", "method", "eval"]}]
    for unused in ("Suite", "Config"):
        text = json.dumps({k: v for k, v in schema.items() if k != "$defs"}) + json.dumps(
            {k: v for k, v in definitions.items() if k != unused}
        )
        if f'"#/$defs/{unused}"' not in text:
            definitions.pop(unused, None)
    return schema


def schema_command() -> int:
    """Print the schema."""
    print(json.dumps(recipe_schema(), indent=2))
    return 0

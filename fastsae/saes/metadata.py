"""Where an SAE belongs: a dictionary whose entries are attributes as well."""

from typing import Any


class Metadata(dict[str, Any]):
    """Keys such as model_name, hook_name, context_size; a key that is not there reads as None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for protocols
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

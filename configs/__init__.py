"""Studies as YAML files, read through `importlib.resources.files("clagrange.configs")`."""

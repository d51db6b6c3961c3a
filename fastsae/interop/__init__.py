"""Other libraries' models and files, one module each, imported where they are used."""

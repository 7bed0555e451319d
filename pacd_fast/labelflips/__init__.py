"""Label-flip certificates, attacks beside them, features that read no label, and the file of certificates."""

"""A placement request in, Ray actors that form one process group out."""

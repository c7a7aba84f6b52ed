"""A population's durable state seen from one process, and everything that changes it but waves."""

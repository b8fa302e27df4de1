//! The crate seen from outside: bytes that must never change, and bytes that must never be believed.

mod corpus;
mod cursor;
mod envelope;
mod golden;
mod host;
mod identity;
mod samples;
mod uri;

//! One module per target.

pub(crate) mod checkpoint;
pub(crate) mod frames;
pub(crate) mod header;
pub(crate) mod http;
pub(crate) mod kv;
pub(crate) mod reports;
pub(crate) mod specs;
pub(crate) mod templates;

//! Reads files of manifests as strictly as an API server with strict field validation: no unknown field, no
//! duplicate key, every bound of the schema, every CEL rule. What is refused is named by its path, with the fix
//! where there is one, and all faults of an object are told at once.
//!
//! Rules are evaluated only on objects that their schema accepts, as the API server does: a rule may rely on the
//! types and bounds of what it reads.

use std::{fmt, sync::LazyLock};

use kube::core::cel::{Validator, apply_defaults};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{GROUP, MoEModel, MoETier, VERSION, crd};

mod structure;

/// One document of a file.
#[derive(Clone, Debug)]
pub enum Document {
    /// A model that an API server would accept.
    Model(Box<MoEModel>),
    /// An object of another kind, unchecked.
    Other {
        /// Its `kind`.
        kind: String,
        /// Its `metadata.name`.
        name: String,
    },
}

/// A fault of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Where: `spec.experts.shards`.
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// Why a file cannot be used.
#[derive(Debug)]
pub enum ManifestError {
    /// It is no YAML, or has a key twice; the message has line and column.
    Syntax(String),
    /// A document is no Kubernetes object.
    NoObject {
        /// Its number in the file, from 1.
        document: usize,
        /// What it lacks.
        lacks: &'static str,
    },
    /// An API server would refuse the object.
    Refused {
        /// Kind and name.
        object: String,
        /// Every fault.
        refusals: Vec<Refusal>,
    },
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Syntax(message) => write!(f, "not YAML: {message}"),
            Self::NoObject { document, lacks } => write!(f, "document {document} has no {lacks}"),
            Self::Refused { object, refusals } => {
                write!(f, "{object} is refused:")?;
                refusals.iter().try_for_each(|refusal| write!(f, "\n  {refusal}"))
            }
        }
    }
}

impl std::error::Error for ManifestError {}

/// Reads every document of a YAML (or JSON) file; empty documents are skipped.
pub fn read(text: &str) -> Result<Vec<Document>, ManifestError> {
    let values: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| ManifestError::Syntax(error.to_string()))?;
    let present = values.into_iter().enumerate().filter(|(_, value)| !value.is_null());
    present.map(|(index, value)| document(index + 1, value)).collect()
}

fn document(document: usize, value: Value) -> Result<Document, ManifestError> {
    let text = |pointer: &str, lacks: &'static str| {
        let found = value.pointer(pointer).and_then(Value::as_str).filter(|text| !text.is_empty());
        found.map(str::to_owned).ok_or(ManifestError::NoObject { document, lacks })
    };
    let api_version = text("/apiVersion", "apiVersion")?;
    let kind = text("/kind", "kind")?;
    let name = text("/metadata/name", "metadata.name")?;
    if api_version.split('/').next() != Some(GROUP) {
        return Ok(Document::Other { kind, name });
    }
    let refused = |refusals| ManifestError::Refused { object: format!("{kind} {name}"), refusals };
    if api_version != format!("{GROUP}/{VERSION}") {
        let message = format!("{api_version:?} does not exist, {GROUP}/{VERSION} does");
        return Err(refused(vec![Refusal { path: "apiVersion".into(), message }]));
    }
    match kind.as_str() {
        "MoEModel" => model(&value).map(|model| Document::Model(Box::new(model))).map_err(refused),
        "MoETier" => {
            tier(&value).map(|_| Document::Other { kind: kind.clone(), name: name.clone() }).map_err(refused)
        }
        _ => {
            Err(refused(vec![Refusal { path: "kind".into(), message: "MoEModel and MoETier exist".into() }]))
        }
    }
}

/// A model, if an API server would let it be created.
pub fn model(value: &Value) -> Result<MoEModel, Vec<Refusal>> {
    accept(value, None, 0)
}

/// A model, if an API server would let it replace `old`.
pub fn model_update(value: &Value, old: &Value) -> Result<MoEModel, Vec<Refusal>> {
    accept(value, Some(old), 0)
}

/// A tier, if an API server would let it be created.
pub fn tier(value: &Value) -> Result<MoETier, Vec<Refusal>> {
    accept(value, None, 1)
}

/// A tier, if an API server would let it replace `old`.
pub fn tier_update(value: &Value, old: &Value) -> Result<MoETier, Vec<Refusal>> {
    accept(value, Some(old), 1)
}

/// `index` is the kind's place in [`crd::all`].
fn accept<T: DeserializeOwned>(value: &Value, old: Option<&Value>, index: usize) -> Result<T, Vec<Refusal>> {
    // Made from the types, which takes longer than everything that is done with it.
    static SCHEMAS: LazyLock<Vec<Value>> = LazyLock::new(|| crd::all().iter().map(crd::schema).collect());
    let schema = &SCHEMAS[index];
    let refusals = structure::check(value, schema);
    if !refusals.is_empty() {
        return Err(refusals);
    }
    let value = apply_defaults(schema, value);
    let old = old.map(|old| apply_defaults(schema, old));
    if let Err(errors) = Validator::new().validate(schema, &value, old.as_ref()) {
        let refusal = |error: &kube::core::cel::ValidationError| Refusal {
            path: error.field_path.trim_start_matches('.').to_owned(),
            message: error.message.clone(),
        };
        return Err(errors.as_slice().iter().map(refusal).collect());
    }
    serde_json::from_value(value)
        .map_err(|error| vec![Refusal { path: String::new(), message: error.to_string() }])
}

#[cfg(test)]
mod tests;

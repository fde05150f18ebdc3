#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::Value;

use super::structure::KEYWORDS;
use crate::crd;

/// A keyword that [`super::structure`] does not know would be a bound that only the API server keeps.
#[test]
fn every_keyword_of_the_schemas_is_known() {
    fn visit(schema: &Value) {
        for (key, value) in schema.as_object().unwrap() {
            assert!(KEYWORDS.contains(&key.as_str()), "{key} in {schema}");
            match key.as_str() {
                "properties" => value.as_object().unwrap().values().for_each(visit),
                "items" | "additionalProperties" => visit(value),
                _ => {}
            }
        }
    }
    crd::all().iter().map(crd::schema).for_each(|schema| visit(&schema));
}

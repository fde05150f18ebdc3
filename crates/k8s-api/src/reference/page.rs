//! docs/api.md: every field, rule and column of both kinds.

use std::fmt::Write as _;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceDefinitionVersion,
};
use serde_json::Value;

use super::{cell, message, words};
use crate::{GROUP, VERSION, crd};

/// A field with its path.
struct Field<'a> {
    path: String,
    schema: &'a Value,
    required: bool,
}

/// Patterns by number, so that tables stay readable.
#[derive(Default)]
struct Patterns(Vec<String>);

impl Patterns {
    fn name(&mut self, pattern: &str) -> String {
        let known = self.0.iter().position(|known| known == pattern);
        let at = known.unwrap_or_else(|| {
            self.0.push(pattern.to_owned());
            self.0.len() - 1
        });
        format!("[pattern {}](#patterns)", at + 1)
    }
}

/// The API reference in Markdown, without the title.
pub fn api_page() -> String {
    let mut page = format!(
        "Group `{GROUP}`, version `{VERSION}`. Unknown fields are refused by strict field validation, which is \
         kubectl's default, and by `cadre operator plan`. Defaults and bounds are in the schema that the API server \
         enforces; a field without a default may be left out.\n"
    );
    let mut patterns = Patterns::default();
    for crd in crd::all() {
        // Writing to a string cannot fail.
        let _ = write_kind(&mut page, &crd, &mut patterns);
    }
    page.push_str("\n## Patterns\n\nRE2 syntax; the whole value must match.\n\n");
    for (index, pattern) in patterns.0.iter().enumerate() {
        let _ = writeln!(page, "{}. `{pattern}`", index + 1);
    }
    page
}

fn write_kind(
    page: &mut String,
    crd: &CustomResourceDefinition,
    patterns: &mut Patterns,
) -> std::fmt::Result {
    let schema = crd::schema(crd);
    let names = &crd.spec.names;
    writeln!(page, "\n## {}\n\n{}\n", names.kind, schema["description"].as_str().unwrap_or_default())?;
    let short = names.short_names.iter().flatten().map(|name| format!("`{name}`"));
    let kubectl: Vec<String> = [format!("`{}`", names.plural)].into_iter().chain(short).collect();
    write!(page, "{} scope. For kubectl: {}.", crd.spec.scope, kubectl.join(", "))?;
    let version = crd.spec.versions.first();
    if let Some(scale) = version.and_then(|version| version.subresources.as_ref()?.scale.as_ref()) {
        write!(
            page,
            " Scale subresource: `{}`, `{}`, selector `{}`.",
            scale.spec_replicas_path.trim_start_matches('.'),
            scale.status_replicas_path.trim_start_matches('.'),
            scale.label_selector_path.as_deref().unwrap_or_default().trim_start_matches('.')
        )?;
    }
    let selectable = version.and_then(|version| version.selectable_fields.as_ref());
    for field in selectable.into_iter().flatten() {
        write!(page, " Field selector: `{}`.", field.json_path.trim_start_matches('.'))?;
    }
    writeln!(page)?;
    write_fields(page, "Spec", &fields(&schema, "spec"), patterns)?;
    write_rules(page, &schema)?;
    write_fields(page, "Status", &fields(&schema, "status"), patterns)?;
    version.map_or(Ok(()), |version| write_columns(page, version))
}

/// Fields of Kubernetes' own types: documented by Kubernetes, and long.
const KUBERNETES: [&str; 3] = ["affinity", "clients", "metrics"];

/// Everything below a top-level field, in the schema's order.
fn fields<'a>(schema: &'a Value, top: &str) -> Vec<Field<'a>> {
    let mut found = Vec::new();
    collect(&schema["properties"][top], top, &mut found);
    found
}

fn collect<'a>(schema: &'a Value, path: &str, found: &mut Vec<Field<'a>>) {
    let required =
        |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|one| one == name));
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        found.push(Field { path: path.clone(), schema: inner, required: required(name) });
        if KUBERNETES.contains(&name.as_str()) {
            continue;
        }
        collect(inner, &path, found);
        collect(&inner["items"], &format!("{path}[]"), found);
    }
}

fn write_fields(
    page: &mut String,
    title: &str,
    fields: &[Field<'_>],
    patterns: &mut Patterns,
) -> std::fmt::Result {
    writeln!(page, "\n### {title}\n\n| field | type | default | bounds | meaning |\n|---|---|---|---|---|")?;
    for Field { path, schema, required } in fields {
        let default = match schema.get("default") {
            Some(default) => format!("`{default}`"),
            None if *required => "required".to_owned(),
            None => String::new(),
        };
        let bounds = words::bounds_of(schema, &mut |pattern| patterns.name(pattern));
        let meaning = cell(schema["description"].as_str().unwrap_or_default());
        writeln!(page, "| `{path}` | {} | {default} | {bounds} | {meaning} |", words::type_of(schema))?;
    }
    Ok(())
}

/// Every rule with the fields that it is about.
fn write_rules(page: &mut String, schema: &Value) -> std::fmt::Result {
    let mut found = Vec::new();
    rules("", schema, &mut found);
    writeln!(
        page,
        "\n### Rules\n\nEvaluated at admission (CEL). ⟨…⟩ stands for the value in the message.\n\n\
         | field | must hold | else |\n|---|---|---|"
    )?;
    // The same rule of several fields is one row.
    let mut rows: Vec<(Vec<String>, String, String)> = Vec::new();
    for (path, rule) in found {
        let (text, told) = (cell(rule["rule"].as_str().unwrap_or_default()), cell(&message::of_rule(rule)));
        let at = where_broken(&path, rule);
        match rows.iter_mut().find(|(_, known, words)| (known, words) == (&text, &told)) {
            Some((fields, ..)) if fields.contains(&at) => {}
            Some((fields, ..)) => fields.push(at),
            None => rows.push((vec![at], text, told)),
        }
    }
    for (fields, text, told) in rows {
        writeln!(page, "| {} | `{text}` | {told} |", fields.join(", "))?;
    }
    Ok(())
}

/// The field that a refusal names.
fn where_broken(path: &str, rule: &Value) -> String {
    let at = format!("{path}{}", rule["fieldPath"].as_str().unwrap_or_default());
    match at.trim_start_matches('.') {
        "" => "the object".to_owned(),
        at => format!("`{at}`"),
    }
}

fn rules<'a>(path: &str, schema: &'a Value, found: &mut Vec<(String, &'a Value)>) {
    let own = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    found.extend(own.map(|rule| (path.to_owned(), rule)));
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        rules(&format!("{path}.{name}"), inner, found);
    }
    if schema["items"].is_object() {
        rules(&format!("{path}[]"), &schema["items"], found);
    }
}

fn write_columns(page: &mut String, version: &CustomResourceDefinitionVersion) -> std::fmt::Result {
    writeln!(page, "\n### Columns of `kubectl get`\n\n| column | shown | value |\n|---|---|---|")?;
    for column in version.additional_printer_columns.iter().flatten() {
        let shown = if column.priority.unwrap_or(0) == 0 { "always" } else { "with `-o wide`" };
        writeln!(
            page,
            "| {} | {shown} | `{}` |",
            column.name,
            cell(column.json_path.trim_start_matches('.'))
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_rule_and_column_has_a_row() {
        let page = api_page();
        for crd in crd::all() {
            let schema = crd::schema(&crd);
            for top in ["spec", "status"] {
                let fields = fields(&schema, top);
                assert!(fields.len() >= 4, "{top}: {}", fields.len());
                for field in fields {
                    assert!(page.contains(&format!("\n| `{}` | ", field.path)), "{}", field.path);
                }
            }
            let mut found = Vec::new();
            rules("", &schema, &mut found);
            assert!(!found.is_empty());
            for (path, rule) in found {
                assert!(page.contains(&cell(rule["rule"].as_str().unwrap_or_default())), "{path}");
            }
        }
        for row in
            ["| `spec.experts.shards` | integer | required | 1 to 1024 |", "| Loaded | with `-o wide` |"]
        {
            assert!(page.contains(row), "{row}");
        }
    }

    /// A table whose rows have different numbers of cells is shown as text.
    #[test]
    fn tables_are_well_formed() {
        let mut width = None;
        for line in api_page().lines() {
            let cells = line.starts_with('|').then(|| line.replace("\\|", "").matches('|').count());
            if let (Some(before), Some(now)) = (width, cells) {
                assert_eq!(before, now, "{line}");
            }
            width = cells;
        }
    }
}

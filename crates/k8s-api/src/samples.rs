//! The samples of `deploy/samples`, made of the types: what they show exists, and has its present name.
//!
//! `cargo xtask generate` writes the files. A comment belongs to the field that it stands before; a comment on a field
//! that a sample does not have is an error of the tests.

use serde_json::Value;

mod autoscalers;
mod deepseek;
mod pocket;
mod yaml;

/// A file of `deploy/samples`.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Its name.
    pub file: &'static str,
    /// What it is for: the comment at its beginning.
    about: &'static str,
    objects: Vec<Object>,
}

/// An object of a sample.
#[derive(Clone, Debug)]
struct Object {
    value: Value,
    /// Comments: the path of the field that each stands before (`spec.experts`), and its lines.
    notes: &'static [(&'static str, &'static str)],
}

/// All of them.
pub fn all() -> Result<Vec<Sample>, serde_json::Error> {
    Ok(vec![
        pocket::sample()?,
        deepseek::one_node()?,
        deepseek::ep32()?,
        deepseek::pools()?,
        autoscalers::hpa(),
        autoscalers::keda(),
    ])
}

impl Sample {
    /// The file's text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        yaml::comment(&mut text, 0, self.about);
        for (number, object) in self.objects.iter().enumerate() {
            if number > 0 {
                text.push_str("---\n");
            }
            yaml::write(&mut text, &object.value, object.notes);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn every_text_reads_as_its_objects() {
        for sample in all().unwrap() {
            let read: Vec<Value> = serde_saphyr::from_multiple(&sample.text()).unwrap();
            let written: Vec<&Value> = sample.objects.iter().map(|object| &object.value).collect();
            assert_eq!(read.iter().collect::<Vec<_>>(), written, "{}", sample.file);
        }
    }

    #[test]
    fn every_comment_stands_before_a_field_that_is_there() {
        for sample in all().unwrap() {
            for object in &sample.objects {
                for (path, _) in object.notes {
                    let pointer = format!("/{}", path.replace('.', "/"));
                    assert!(object.value.pointer(&pointer).is_some(), "{}: no {path}", sample.file);
                }
            }
        }
    }

    #[test]
    fn lines_fit() {
        for sample in all().unwrap() {
            for line in sample.text().lines() {
                // A query of Prometheus is one string.
                assert!(line.len() <= 120 || line.contains("query: "), "{}: {line}", sample.file);
            }
        }
    }
}

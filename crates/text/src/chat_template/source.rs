//! A template's source before the engine sees it: bounded, and rewritten where Jinja says more than the
//! engine parses.
//!
//! The engine parses by recursion and guards only some of it: a chain of a hundred thousand `+` or `elif`
//! is a tree of that depth, and a thread's stack ends before it. Here every expression is counted in
//! tokens, without recursion, before anything is parsed.
//!
//! Rewritten, token by token and on the same line, so that errors still name the line of the file:
//! - `{% generation %}…{% endgeneration %}`, which marks what an assistant said for training and writes
//!   its body, becomes a `with` block (a scope of its own, as in Hugging Face);
//! - `'…' % x` becomes `('…'|percent_format(x))`;
//! - a macro that reads `varargs` gets them as a parameter, and its calls pass them;
//! - every value that gets a name (`set`, `with`, `for`, the parameters of macros, `loop(…)`) goes through
//!   the filter `within_bounds`, so that none can grow without bound (see [`super::bounded`]);
//! - so does what has no name and is written out (operands of `~`, what stands before `in`) or multiplied (what stands
//!   before `*`).

mod names;
mod rewrite;
mod scan;

pub(super) use names::Names;
use rewrite::apply;
use scan::Scan;

/// Longest source. Published templates have 1 to 20 KB.
pub(super) const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Most tokens of one tag; each may be a level of the syntax tree. The largest published have some 200.
/// [`super::renderer::STACK_BYTES`] is derived from it.
pub(super) const MAX_TAG_TOKENS: usize = 2048;
/// Most `elif` of a template, which nest in the syntax tree.
pub(super) const MAX_ELIFS: usize = 512;

/// A source ready for the engine.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// What the engine is given.
    pub(super) text: String,
    /// What the template uses of the environment, to be looked for in it.
    pub(super) names: Names,
}

/// Checks a source and rewrites it; the error says what is too large or not ended, and where.
pub(super) fn prepare(source: &str) -> Result<Prepared, String> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(format!("{} bytes of source, at most {MAX_SOURCE_BYTES} are accepted", source.len()));
    }
    let scan = Scan::new(source)?;
    let mut edits = Vec::new();
    scan.generation_tags(&mut edits);
    scan.percent_formats(&mut edits);
    scan.varargs(&mut edits);
    scan.bounds(&mut edits);
    scan.unnamed(&mut edits);
    Ok(Prepared { text: apply(source, edits), names: scan.names() })
}

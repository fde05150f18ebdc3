//! Generated parts of pages that people write: everything between `<!-- generated: NAME -->` and `<!-- end: NAME -->`.

use anyhow::{Context, Result};

/// The page with this part in the place of the old one. A page without the marks is an error: the part would be lost.
pub(super) fn replace(page: &str, name: &str, part: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- generated: {name} -->\n"), format!("<!-- end: {name} -->"));
    let (before, rest) =
        page.split_once(&begin).with_context(|| format!("no line `{}`", begin.trim_end()))?;
    let (_, after) = rest.split_once(&end).with_context(|| format!("no line `{end}` after its beginning"))?;
    Ok(format!("{before}{begin}\n{}\n\n{end}{after}", part.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let page = "a\n<!-- generated: x -->\nold\n<!-- end: x -->\nb\n";
        let new = replace(page, "x", "| new |\n").expect("the marks are there");
        assert_eq!(new, "a\n<!-- generated: x -->\n\n| new |\n\n<!-- end: x -->\nb\n");
        assert_eq!(replace(&new, "x", "| new |\n").expect("the marks are there"), new);
    }

    #[test]
    fn a_page_without_the_marks_is_refused() {
        for page in ["a\n", "<!-- generated: x -->\nold\n", "<!-- end: x -->\n<!-- generated: x -->\n"] {
            replace(page, "x", "new").expect_err(page);
        }
    }
}

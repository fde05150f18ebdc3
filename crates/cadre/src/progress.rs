//! Progress bars on standard error; they draw themselves only on a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over bytes whose total is not known yet.
pub(crate) fn bytes(what: &'static str) -> ProgressBar {
    styled(what, "{msg} {bar:32} {bytes}/{total_bytes} {bytes_per_sec}")
}

/// A bar over steps.
pub(crate) fn steps(what: &'static str, total: usize) -> ProgressBar {
    let bar = styled(what, "{msg} {bar:32} {pos}/{len}");
    bar.set_length(total as u64);
    bar
}

/// Moves a bar; the first call also tells it the total.
pub(crate) fn set(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_length(total);
    bar.set_position(done);
}

fn styled(what: &'static str, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_message(what);
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

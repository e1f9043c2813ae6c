const choose = document.getElementById("store");
if (choose) {
  const show = () => {
    for (const panel of document.querySelectorAll(".store")) panel.hidden = panel.dataset.store !== choose.value;
  };
  document.querySelector(".pick").hidden = false;
  choose.addEventListener("change", show);
  show();
}
